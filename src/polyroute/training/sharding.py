"""FSDP2: the base model is sharded, and what trains stays whole in every process."""

from collections.abc import Callable

import torch
from torch import Tensor, distributed, nn

from polyroute.model import RoutedModel

__all__ = ["keep_whole"]


def keep_whole(
    model: RoutedModel, device: torch.device, is_last: Callable[[], bool]
) -> list[nn.Module]:
    """Keep all that trains, and weights that several layers share, whole in every process.

    What trains becomes equal everywhere, and its gradients are averaged over processes.

    Args:
        model: before it is sharded.
        device: of this process.
        is_last: whether the micro-batch that runs now is the last of its step.

    Returns:
        The modules that FSDP must leave alone.
    """
    owners: dict[Tensor, list[nn.Module]] = {}
    for module in model.base_model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(module)
    shared = [module for tied in owners.values() if len(tied) > 1 for module in tied]
    trained = [model.inventory, model.routes, model.rule, *model.wrapping.trained.values()]
    whole: list[nn.Module] = [*trained, *shared]
    for module in whole:
        module.to(device)

    def average(parameter: Tensor) -> None:
        if is_last():
            assert parameter.grad is not None
            distributed.all_reduce(parameter.grad)
            parameter.grad /= distributed.get_world_size()

    for parameter in model.parameters():
        if parameter.requires_grad:
            distributed.broadcast(parameter.detach(), src=0)
            parameter.register_post_accumulate_grad_hook(average)  # type: ignore[no-untyped-call]
    return whole
