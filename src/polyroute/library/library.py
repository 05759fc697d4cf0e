"""LoRAs of one base model that were made apart: what they are, how alike they are, their sums.

Shape letters: E LoRAs.
"""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyroute.errors import InputError, did_you_mean, first_few
from polyroute.exchange.peft_folder import folders_inside
from polyroute.host.paths import path_of
from polyroute.library.attaching import attach_library
from polyroute.library.delta import Delta, cosines, inner_products, keeping
from polyroute.library.merging import DENSE, WAYS, Terms, check_options, merged
from polyroute.model import RoutedModel
from polyroute.routes.table import MU
from polyroute.saved.peft_export import CONFIG
from polyroute.task_names import check_names

__all__ = ["Library"]

NAMED = 3
"""As many of the LoRAs that are left out are named in the warning."""
AT_ONCE = 32
"""The LoRAs that are compared with as many others at once."""


class Library(Mapping[str, Delta]):
    """LoRAs by name, each read from its folder when it is asked for.

        library = pr.Library.from_peft({"sql": "loras/sql", "legal": "loras/legal"})
        library.table()
        library.merge("mean", rank=16).save_peft("loras/both")

    `from_peft` makes one.
    """

    def __init__(
        self,
        folders: Mapping[str, Path],
        ranks: Mapping[str, Mapping[str, int]],
        widths: Mapping[str, tuple[int, int]],
        refused: Mapping[str, str],
        *,
        allow_pickle: bool,
    ) -> None:
        self._folders, self._allow_pickle = dict(folders), allow_pickle
        self.ranks = dict(ranks)
        """By LoRA and layer, the rank."""
        self.widths = dict(widths)
        """By layer, the widths in and out."""
        self.refused = dict(refused)
        """Why other LoRAs that were named are not in the library."""

    @classmethod
    def from_peft(
        cls,
        loras: Mapping[str, str | os.PathLike[str]] | str | os.PathLike[str],
        *,
        allow_pickle: bool = False,
    ) -> "Library":
        """Gather LoRAs that PEFT or polyroute wrote, and read each once.

        One that cannot be read, computes more than a low-rank update or does not fit the first is
        left out, and a warning says why; so does `refused`.

        Args:
            loras: folders by name; or one folder with LoRAs in its sub-folders, which name them.
            allow_pickle: read `adapter_model.bin` where there are no safetensors.

        Raises:
            InputError: not one LoRA can be used, or a name cannot be that of a task.
        """
        folders = _named(loras)
        refused: dict[str, str] = {}
        ranks: dict[str, dict[str, int]] = {}
        widths: dict[str, tuple[int, int]] = {}
        for name, folder in folders.items():
            try:
                delta = Delta.from_peft(folder, allow_pickle=allow_pickle)
                own = delta.widths
                for layer in sorted(own.keys() & widths.keys()):
                    if own[layer] != widths[layer]:
                        raise InputError(
                            f"{folder} has a layer {layer!r} of {own[layer]}, the others of "
                            f"{widths[layer]}: it belongs to another base model"
                        )
            except InputError as error:
                refused[name] = str(error)
            else:
                widths |= own
                ranks[name] = delta.ranks
        kept = {name: folders[name] for name in ranks}
        if not kept:
            raise InputError(f"no LoRA can be used: {next(iter(refused.values()))}")
        if refused:
            why = first_few([f"{name}: {reason}" for name, reason in refused.items()], NAMED)
            count = "1 LoRA is" if len(refused) == 1 else f"{len(refused)} LoRAs are"
            warnings.warn(f"{count} left out ({why})", stacklevel=2)
        return cls(kept, ranks, widths, refused, allow_pickle=allow_pickle)

    def __getitem__(self, name: str) -> Delta:
        """A LoRA by its name.

        Raises:
            InputError: there is none of this name.
        """
        self.check_name(name)
        return Delta.from_peft(self._folders[name], allow_pickle=self._allow_pickle)

    def get(self, name: str, default: Any = None) -> Any:
        """A LoRA by its name, or the default if there is none."""
        return self[name] if name in self else default  # noqa: SIM401 (it would call itself)

    def __contains__(self, name: object) -> bool:
        """Whether there is a LoRA of this name."""
        return name in self._folders

    def __iter__(self) -> Iterator[str]:
        """The names, in the order in which they were given."""
        return iter(self._folders)

    def __len__(self) -> int:
        """The number E of LoRAs."""
        return len(self._folders)

    def check_name(self, name: str) -> None:
        """Make sure that there is a LoRA of this name.

        Raises:
            InputError: there is none; the message offers the nearest names.
        """
        if name not in self._folders:
            raise InputError(f"the library has no LoRA {name!r}: {did_you_mean(name, list(self))}")

    def attach_to(self, base_model: nn.Module, tasks: Sequence[str] | None) -> RoutedModel:
        """What `polyroute.attach` does with a library."""
        return attach_library(base_model, self, list(self) if tasks is None else tasks)

    def gram(self) -> Tensor:
        """The inner products of all pairs, `[E, E]` in fp64; norms and cosines follow from them."""
        names = list(self)
        gram_EE = torch.zeros(len(names), len(names), dtype=torch.float64)
        starts = range(0, len(names), AT_ONCE)
        for i in starts:
            ours = [self[name] for name in names[i : i + AT_ONCE]]
            for j in (start for start in starts if start >= i):
                theirs = ours if i == j else [self[name] for name in names[j : j + AT_ONCE]]
                block = inner_products(ours, theirs)
                gram_EE[i : i + len(ours), j : j + len(theirs)] = block
                gram_EE[j : j + len(theirs), i : i + len(ours)] = block.t()
        return gram_EE

    def table(self) -> list[dict[str, Any]]:
        """What each LoRA is, and which other is most alike.

        Returns:
            For each LoRA its `name`, how many `layers` it has, the largest `rank`, its `norm`, the
            name of the `nearest`, and the `cosine` with it; for one that was left out, `refused`.
        """
        gram_EE = self.gram()
        norms_E, cosines_EE = gram_EE.diagonal().clamp(min=0).sqrt(), cosines(gram_EE)
        names = list(self)
        rows: list[dict[str, Any]] = []
        for i, name in enumerate(names):
            ranks = self.ranks[name].values()
            row = {"name": name, "layers": len(ranks), "rank": max(ranks)}
            others = cosines_EE[i].clone()
            others[i] = -torch.inf
            nearest = int(others.argmax())
            alike = {"nearest": names[nearest], "cosine": float(others[nearest])}
            rows.append({**row, "norm": float(norms_E[i]), **(alike if len(names) > 1 else {})})
        return rows + [{"name": name, "refused": why} for name, why in self.refused.items()]

    def _warn_of_strangers(self, names: Iterable[str]) -> None:
        """Warn of a LoRA that has no layer in common with any other: their names may differ."""
        layers = {name: set(self.ranks.get(name, ())) for name in names}
        for name, own in layers.items():
            others = set().union(*(theirs for other, theirs in layers.items() if other != name))
            if others and not own & others:
                warnings.warn(
                    f"the LoRA {name!r} has no layer in common with the others, such as "
                    f"{min(own)!r} beside {min(others)!r}: if these are one layer under two names, "
                    "save both LoRAs from one class of the base model",
                    stacklevel=3,
                )
                return

    def merge(
        self,
        method: str,
        *,
        weights: Mapping[str, float] | float = 1.0,
        rank: int | None = None,
        energy: float | None = None,
        **options: float,
    ) -> Delta:
        """One LoRA from all. A layer is merged at a time, then recompressed if asked for.

        | method | update of a layer | options |
        |---|---|---|
        | `mean` | the mean, exactly | |
        | `arithmetic` | the weighted sum, exactly; weights may be negative | |
        | `ties` | of each entry, the mean of the LoRAs that agree on its sign | `keep`, `drop` |
        | `dare` | the sum of randomly thinned LoRAs | `drop`, `seed` |
        | `knots` | as `ties`, in the basis of outputs that the LoRAs share | `keep`, `drop` |
        | `wudi` | what interferes least with each LoRA's own inputs | `ridge` |

        `polyroute.library.merging` has the equations and defaults. Results of `ties` and `dare` are
        dense, so they need `rank` or `energy`; `error` says what that loses.

        Args:
            method: one of the table.
            weights: for all but `mean`, one number for all LoRAs, or those that take part. They
                multiply the LoRAs before anything else happens.
            rank: see `Delta.recompress`.
            energy: see `Delta.recompress`.
            **options: of the method.

        Raises:
            InputError: there is no such method, LoRA or option, an option is out of range, weights
                are given to the mean, or a dense result has neither rank nor energy.
        """
        check_options(method, options)
        is_asked = rank is not None or energy is not None
        if not is_asked and method in DENSE:
            raise InputError(
                f"the result of {method!r} is dense: say with rank or energy how much stays"
            )
        keep = keeping(rank, energy) if is_asked else None
        self._warn_of_strangers(weights if isinstance(weights, Mapping) else self)
        if method == "mean" and weights != 1.0:
            raise InputError("the mean has no weights; merge with 'arithmetic'")
        if not isinstance(weights, Mapping):
            weights = dict.fromkeys(self, 1 / len(self) if method == "mean" else weights)
        if not weights:
            raise InputError("weights name no LoRA to merge")
        terms = Terms({name: self[name] for name in weights}, weights)
        return merged(terms, WAYS[method](terms, **options), keep)


def _named(
    loras: Mapping[str, str | os.PathLike[str]] | str | os.PathLike[str],
) -> dict[str, Path]:
    if isinstance(loras, Mapping):
        folders = {name: path_of(folder) for name, folder in loras.items()}
    elif not isinstance(loras, str | os.PathLike):
        raise InputError(f"loras must be folders by name, or one folder, not {loras!r}")
    elif ((place := path_of(loras)) / CONFIG).is_file():
        folders = {place.resolve().name: place}
    else:
        folders = {path.relative_to(place).as_posix(): path for path in folders_inside(place)}
    if not folders:
        raise InputError(f"there are no LoRAs in {loras}")
    check_names(folders)
    for name in folders:
        if name == MU or {".", ".."} & set(name.split("/")):
            raise InputError(
                f"a LoRA cannot be called {name!r}, which stands for something else; rename it"
            )
    return folders
