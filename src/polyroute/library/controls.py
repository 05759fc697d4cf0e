"""Controls for claims about a library: random LoRAs in its place, and given factors."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from polyroute.errors import InputError
from polyroute.layer.factors import Factors, LoRAFactors, PlainFactors
from polyroute.library.attaching import library_of
from polyroute.library.delta import norm
from polyroute.model import RoutedModel
from polyroute.routes.mixer import Mixer
from polyroute.routes.rule import Batch, RouteRule

__all__ = ["Given", "random_skills"]


class Given(RouteRule):
    """Applies the same factors to every token; without factors the base model runs alone.

    Args:
        factors: those of each site, such as `Adapted.factors`.
    """

    needs_tasks = False
    stands_alone = True

    def __init__(self, factors: Sequence[PlainFactors] = ()) -> None:
        super().__init__()
        self._factors = [own for own in factors if isinstance(own, LoRAFactors)]
        if len(self._factors) < len(factors):
            raise InputError("only LoRAs can be given")

    def factors(self, batch: Batch, mixer: Mixer) -> Sequence[Factors]:
        """What was given, in the type that the layers compute in."""
        device, dtype = mixer.device, batch.dtype
        return [LoRAFactors(f.a.to(device, dtype), f.b.to(device, dtype)) for f in self._factors]


@contextmanager
def random_skills(model: RoutedModel, seed: int) -> Iterator[None]:
    """Within the block, every LoRA is a random one of the same rank and norm in every layer.

    Raises:
        InputError: the model has no library.
    """
    inventory = library_of(model)
    kept = [p.detach().clone() for p in inventory.parameters()]
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for site in range(len(inventory.sites)):
                for skill in range(inventory.num_skills):
                    _draw(inventory.skill(site, skill), generator)
        yield
    finally:
        with torch.no_grad():
            for parameter, values in zip(inventory.parameters(), kept, strict=True):
                parameter.copy_(values)


def _draw(own: LoRAFactors, generator: torch.Generator) -> None:
    if not len(own.a):
        return
    size = norm(own)
    for factor in (own.a, own.b):
        factor.copy_(torch.randn(factor.shape, generator=generator))
    own.b.mul_(size / norm(own))
