"""Optimizers by name, and Adafactor as the published runs used it.

Adafactor (Shazeer & Stern 2018, arXiv:1804.04235) does not keep the second moment itself, only its
means over each of the last two dimensions, and it limits and scales the step of a tensor by root
mean squares over that tensor. So its steps depend on where one tensor ends and another begins. The
published code has one A and one B for each layer and one table for each router; here all layers of
one shape are one parameter, and all routers are one parameter.

Shape letters: n layers of a stack or routers, T tasks, H heads, K skills, r rank, D width of a
head's block.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from polyroute.errors import InputError, did_you_mean
from polyroute.model import RoutedModel

__all__ = ["OPTIMIZERS", "LayerAdafactor", "check_optimizer", "make_optimizer", "summary"]

OPTIMIZERS = ("adamw", "adafactor", "sgd")
"""`adafactor` is `LayerAdafactor`; the others are torch's and do not see where tensors end."""

DECAY_RATE = -0.8
SMALLEST_SQUARE = 1e-30
SMALLEST_SCALE = 1e-3
LARGEST_UPDATE = 1.0


class LayerAdafactor(torch.optim.Optimizer):
    """Adafactor in which every layer, and every router, is a tensor of its own.

    Let G be the gradient of such a tensor X at step t, and R and C running means of G^2 + 1e-30,
    over its last dimension and its last but one, with decay 1 - t^-0.8. Then

        U = G / sqrt(R C / mean(R))
        X <- X - rate (U / max(1, rms(U)) + weight_decay X)
        rate = lr max(1e-3, rms(X))          with scale_parameter, otherwise lr

    These are the published settings: no first moment, and no learning rate that Adafactor chooses
    itself. With `scale_parameter` a fresh B, which is zero, and fresh logits start a thousand times
    slower than `lr` says.

    All layers of a stack are stepped at once, so the number of operations of a step grows with the
    number of stacks, not with the number of layers.

    Args:
        groups: as `RoutedModel.param_groups` gives them, or views of these parameters for one slot;
            each is named `skills` or `routes`.
        model: tells how many routers a row of the table has, and how skills are laid out.
        scale_parameter: whether to take steps in proportion to the size of what they change.

    Raises:
        InputError: a group has another name.
    """

    def __init__(
        self, groups: list[dict[str, Any]], model: RoutedModel, *, scale_parameter: bool = True
    ) -> None:
        self._num_routers = 1 if model.routes.shape is None else model.routes.shape[0]
        self._is_ia3 = model.inventory.adapter == "ia3"
        for group in groups:
            if group.get("name") not in ("skills", "modules", "rule", "routes"):
                raise InputError(
                    "LayerAdafactor needs groups named 'skills' and 'routes', as param_groups "
                    f"makes them, not {group.get('name')!r}"
                )
        super().__init__(groups, {"scale_parameter": scale_parameter})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move everything that has a gradient.

        Args:
            closure: computes the loss and its gradients anew, as for any torch optimizer.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    cut = {"skills": self._layers, "routes": self._routers}.get(
                        group["name"], _alone
                    )
                    _step(cut(p), cut(p.grad), self.state[p], group)
        return loss

    def _layers(self, skills: Tensor) -> Tensor:
        """The skills as tensors whose last two dimensions are those of the published code.

        For LoRA they are those of `[n, H, K, r, D]`, whose order does not matter. A published
        (IA)^3 vector has no rank, so its last two dimensions are `[H, D]`.
        """
        return skills.permute(0, 2, 3, 1, 4) if self._is_ia3 else skills

    def _routers(self, logits: Tensor) -> Tensor:
        """A table `[T, N * H * K]`, or one row of it, as `[N, T, H * K]`."""
        width = logits.shape[-1] // self._num_routers
        return logits.view(-1, self._num_routers, width).movedim(1, 0)


def _alone(parameter: Tensor) -> Tensor:
    """An ordinary parameter as the only tensor of a stack, with two dimensions at least."""
    return parameter.reshape(1, 1, -1) if parameter.dim() < 2 else parameter.unsqueeze(0)


def _step(layers: Tensor, gradients: Tensor, state: dict[str, Tensor], group: Any) -> None:
    """One step, in place, of tensors stacked along the first dimension."""
    squares = gradients.square() + SMALLEST_SQUARE
    rows, columns = squares.mean(-1), squares.mean(-2)
    if not state:
        state["step"] = torch.tensor(0.0)
        state["rows"], state["columns"] = torch.zeros_like(rows), torch.zeros_like(columns)
    state["step"] += 1
    fresh = state["step"].item() ** DECAY_RATE
    rows = state["rows"].lerp_(rows, fresh)
    columns = state["columns"].lerp_(columns, fresh)
    updates = gradients * (rows / rows.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1)
    updates *= columns.rsqrt().unsqueeze(-2)
    updates /= (_rms(updates) / LARGEST_UPDATE).clamp_(min=1.0)
    updates *= group["lr"]
    if group["weight_decay"]:
        updates += layers * (group["lr"] * group["weight_decay"])
    if group["scale_parameter"]:
        updates *= _rms(layers).clamp_(min=SMALLEST_SCALE)
    layers -= updates


def _rms(tensors: Tensor) -> Tensor:
    """The root mean square of each tensor, `[n, 1, ...]`."""
    within = tuple(range(1, tensors.ndim))
    norms: Tensor = torch.linalg.vector_norm(tensors, dim=within, keepdim=True)
    return norms / math.sqrt(tensors[0].numel())


def check_optimizer(name: str, *, scale_parameter: bool) -> None:
    """Make sure that there is such an optimizer, and that it has the settings it is given.

    Raises:
        InputError: there is none of that name, or `scale_parameter` is off in one without it.
    """
    if name not in OPTIMIZERS:
        raise InputError(f"unknown optimizer {name!r}: {did_you_mean(name, OPTIMIZERS)}")
    if not isinstance(scale_parameter, bool):
        raise InputError(f"scale_parameter must be True or False, not {scale_parameter!r}")
    if not scale_parameter and name != "adafactor":
        raise InputError(
            f"scale_parameter is a setting of adafactor, which {name} does not have; leave it out"
        )


def make_optimizer(
    name: str, groups: list[dict[str, Any]], model: RoutedModel, *, scale_parameter: bool = True
) -> torch.optim.Optimizer:
    """An optimizer by its name.

    Args:
        name: one of `OPTIMIZERS`.
        groups: see `LayerAdafactor`.
        model: whose parameters these are.
        scale_parameter: see `LayerAdafactor`; only `adafactor` can have it off.

    Raises:
        InputError: as `check_optimizer`.
    """
    check_optimizer(name, scale_parameter=scale_parameter)
    if name == "adafactor":
        return LayerAdafactor(groups, model, scale_parameter=scale_parameter)
    return torch.optim.SGD(groups) if name == "sgd" else torch.optim.AdamW(groups)


def summary(settings: Mapping[str, Any]) -> str:
    """What decides the result of training besides the data, in one line.

    Args:
        settings: the optimizer, `scale_parameter`, rates, decays, clipping, warm-up and schedule,
            by the names of the options of `polyroute train`.
    """
    name, sizes = settings["optimizer"], "on" if settings["scale_parameter"] else "off"
    if name == "adafactor":
        name += f" of each layer, scale_parameter {sizes}"
    decay = f"{settings['weight_decay']:g} / {settings['route_weight_decay']:g}"
    return (
        f"{name}, lr {settings['lr']:g}, routes {settings['route_lr']:g}, decay {decay}, "
        f"clip {settings['max_grad_norm']:g}, warm-up {100 * settings['warmup']:g}%, "
        f"{settings['schedule']}"
    )
