"""Optimizers by name, and Adafactor as the published runs used it.

Adafactor (Shazeer & Stern 2018, arXiv:1804.04235) keeps the means of the second moment over each of
the last two dimensions, not the second moment itself, and it limits and scales the step of a tensor
by root mean squares over the tensor. Its steps therefore depend on how parameters are divided into
tensors. The published code has one A and one B for each layer and one table for each router. Here
all layers of one shape are one parameter, and so are all routers.

Shape letters: n layers of a stack or routers, T tasks, H heads, K skills, r rank, D width of a
head's block.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from polyroute.errors import InputError
from polyroute.model import RoutedModel
from polyroute.settings import flag, named

__all__ = ["OPTIMIZERS", "LayerAdafactor", "check_optimizer", "make_optimizer", "summary"]

OPTIMIZERS = ("adamw", "adafactor", "sgd")
"""`adafactor` is `LayerAdafactor`. The others are torch's, which treat every number separately."""

DECAY_RATE = -0.8
SMALLEST_SQUARE = 1e-30
SMALLEST_SCALE = 1e-3
LARGEST_UPDATE = 1.0


class LayerAdafactor(torch.optim.Optimizer):
    """Adafactor that treats every layer, and every router, as a tensor of its own.

    Let G be the gradient of such a tensor X at step t. Let R and C be the running means of
    G^2 + 1e-30 over its last dimension and over the one before, with decay 1 - t^-0.8. Then

        U = G / sqrt(R C / mean(R))
        X <- X - rate (U / max(1, rms(U)) + weight_decay X)
        rate = lr max(1e-3, rms(X))          with scale_parameter, otherwise lr

    In phase `mu`, X is the average of K skills, and the published code trains the K skills
    themselves under uniform weights. X then moves as their average does: R, C and U are those of
    each of their heads, and rms(X) is that of the K skills together, from which about sqrt(K) times
    longer steps follow (`polyroute.routes.averaging`).

    These are the published settings: there is no first moment, and Adafactor does not choose its
    own learning rate. With `scale_parameter` a new B, which is zero, and new logits start a
    thousand times slower than `lr` says.

    All layers of a stack take their step together, so the number of operations grows with the
    number of stacks, not with the number of layers.

    Args:
        groups: as `RoutedModel.param_groups` makes them, or with views of these parameters for one
            slot; each is named `skills`, `modules`, `rule` or `routes`, and may say what was
            averaged, as `polyroute.routes.averaging.Averaged.group` does.
        model: gives the number of routers in a row of the table, and the layout of skills.
        scale_parameter: whether steps are proportional to the root mean square of their tensor.

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
                    f"makes them, not {group.get('name')!r}: pass the groups of param_groups"
                )
        super().__init__(groups, {"scale_parameter": scale_parameter})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient.

        Args:
            closure: computes the loss and its gradients again, as for any torch optimizer.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for place, p in enumerate(group["params"]):
                if p.grad is not None:
                    self._begin(p, place, group)
                    layers, gradients = (self._cut(t, group) for t in (p, p.grad))
                    _step(layers, gradients, self.state[p], group)
        return loss

    def _begin(self, p: Tensor, place: int, group: Mapping[str, Any]) -> None:
        """Note in the state of a parameter, before its first step, what was averaged in it."""
        if "spread" not in group or "spread" in self.state[p]:
            return
        if self.state[p]:
            raise InputError(
                "these steps of phase 'mu' were begun by a version of polyroute that took shorter "
                "ones under Adafactor: start again, with --overwrite"
            )
        self.state[p]["spread"] = group["spread"][place].to(p, copy=True)

    def _cut(self, tensor: Tensor, group: Mapping[str, Any]) -> Tensor:
        """A parameter of a group, or its gradient, as tensors stacked along the first dimension."""
        if group["name"] == "routes":
            return self._routers(tensor)
        if group["name"] == "skills":
            return self._layers(_heads(tensor, group["heads"]) if "heads" in group else tensor)
        return _alone(tensor)

    def _layers(self, skills: Tensor) -> Tensor:
        """A stack of skills, with the last two dimensions of the published code.

        For LoRA these are the dimensions r and D of `[n, H, K, r, D]`; their order does not matter.
        A published (IA)^3 vector has no rank, and its last two dimensions are H and D.
        """
        return skills.permute(0, 2, 3, 1, 4) if self._is_ia3 else skills

    def _routers(self, logits: Tensor) -> Tensor:
        """A table `[T, N * H * K]`, or one row of it, as one tensor per router: `[N, T, H * K]`."""
        width = logits.shape[-1] // self._num_routers
        return logits.view(-1, self._num_routers, width).movedim(1, 0)


def _heads(average: Tensor, heads: int) -> Tensor:
    """An average `[n, 1, 1, r, H D]`, with the heads of its skills again: `[n, H, 1, r, D]`."""
    return average[:, 0].view(len(average), 1, average.shape[-2], heads, -1).movedim(-2, 1)


def _alone(parameter: Tensor) -> Tensor:
    """An ordinary parameter as a stack of one tensor, with at least two dimensions."""
    return parameter.reshape(1, 1, -1) if parameter.dim() < 2 else parameter.unsqueeze(0)


def _step(layers: Tensor, gradients: Tensor, state: dict[str, Tensor], group: Any) -> None:
    """Take one step, in place, with tensors that are stacked along the first dimension."""
    squares = gradients.square() + SMALLEST_SQUARE
    rows, columns = squares.mean(-1), squares.mean(-2)
    if "step" not in state:
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
    decay = group["lr"] * group["weight_decay"]
    if decay:
        updates += layers * decay
    if group["scale_parameter"]:
        size = _rms(layers)
        if "spread" in state:
            size = (size.square() + state["spread"].view(size.shape)).sqrt_()
        updates *= size.clamp_(min=SMALLEST_SCALE)
        decay = decay * size.flatten()
    if "spread" in state:
        state["spread"] *= (1 - decay) ** 2
    layers -= updates


def _rms(tensors: Tensor) -> Tensor:
    """The root mean square of each tensor, `[n, 1, ...]`."""
    within = tuple(range(1, tensors.ndim))
    norms: Tensor = torch.linalg.vector_norm(tensors, dim=within, keepdim=True)
    return norms / math.sqrt(tensors[0].numel())


def check_optimizer(name: str, *, scale_parameter: bool) -> None:
    """Make sure that an optimizer exists and has the setting `scale_parameter`.

    Raises:
        InputError: there is no optimizer of that name, or `scale_parameter` is off in an optimizer
            that has no such setting.
    """
    named(OPTIMIZERS)("optimizer", name)
    flag()("scale_parameter", scale_parameter)
    if not scale_parameter and name != "adafactor":
        raise InputError(
            f"scale_parameter is a setting of adafactor, which {name} does not have: leave it out"
        )


def make_optimizer(
    name: str, groups: list[dict[str, Any]], model: RoutedModel, *, scale_parameter: bool = True
) -> torch.optim.Optimizer:
    """Make an optimizer by its name.

    Args:
        name: one of `OPTIMIZERS`.
        groups: the parameter groups, as for `LayerAdafactor`.
        model: the model that the parameters belong to.
        scale_parameter: as for `LayerAdafactor`; must be True for other optimizers.

    Raises:
        InputError: as `check_optimizer`.
    """
    check_optimizer(name, scale_parameter=scale_parameter)
    if name == "adafactor":
        return LayerAdafactor(groups, model, scale_parameter=scale_parameter)
    return torch.optim.SGD(groups) if name == "sgd" else torch.optim.AdamW(groups)


def summary(settings: Mapping[str, Any]) -> str:
    """The settings that decide the result of training besides the data, in one line.

    Args:
        settings: the optimizer, `scale_parameter`, rates, decays, clipping, warm-up and schedule,
            under the names of the options of `polyroute train`.
    """
    name = settings["optimizer"]
    if name == "adafactor":
        name += f" of each layer, scale_parameter {'on' if settings['scale_parameter'] else 'off'}"
    decay = f"{settings['weight_decay']:g} / {settings['route_weight_decay']:g}"
    return (
        f"{name}, lr {settings['lr']:g}, routes {settings['route_lr']:g}, decay {decay}, "
        f"clip {settings['max_grad_norm']:g}, warm-up {100 * settings['warmup']:g}%, "
        f"{settings['schedule']}"
    )
