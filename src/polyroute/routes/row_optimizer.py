"""AdamW for an inventory whose routing table is trained by rows.

The skills are stepped as `torch.optim.AdamW` steps them. In the table every row is a parameter of
its own, with moments, bias correction and decay of its own, and a clock that ticks only at steps
in which the row is in the batch. So

- a row that is in every batch moves exactly as under `torch.optim.AdamW`;
- a row that is in some batches moves exactly as if `torch.optim.AdamW` had been run on these
  steps alone.

That is the only difference: dense AdamW also moves a row by its momentum and decays it at steps
whose batch it is not in, and shrinks its moments then. A step costs the rows of its batch, whatever
the size of the table, and only rows that have trained take memory for their moments.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from polyroute.errors import InputError
from polyroute.routes.table import RoutingTable

__all__ = ["RowAdamW"]

MOMENTS = ("exp_avg", "exp_avg_sq")


class RowAdamW(torch.optim.Optimizer):
    """AdamW with one clock per row of the routing table; made by `RoutedModel.optimizer`.

    Gradients accumulate over forwards and backwards until `step`, which uses them up. Tasks may be
    added and dropped between steps. Everything is in `state_dict`, by row number; the moments come
    as `[n, N * H * K]` for the n rows that have trained.

    Args:
        groups: as `RoutedModel.param_groups` gives them; the last is named `routes`, and its
            parameter is `routes.touched`.
        routes: the table, trained by rows.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        routes: RoutingTable,
        *,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        self._routes = routes
        width = groups[-1]["params"][0].shape[1]
        self._moments = {name: torch.empty(0, width) for name in MOMENTS}
        """`[C, N * H * K]` each, for C places of which the first `_used` are taken."""
        self._clocks = torch.empty(0)
        """`[C]`, on the host as torch's own step counts are."""
        self._used = 0
        super().__init__(groups, {"betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the skills, and the rows with a gradient since the last step.

        Args:
            closure: computes the loss and its gradients anew, as for any torch optimizer.

        Raises:
            InputError: another optimizer or phase was made for the model since.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["name"] == "routes":
                self._step_rows(group)
            else:
                self._step_skills(group)
        return loss

    def _step_skills(self, group: dict[str, Any]) -> None:
        moved = [p for p in group["params"] if p.grad is not None]
        for p in moved:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.tensor(0.0),
                    **{name: torch.zeros_like(p) for name in MOMENTS},
                }
        states = [self.state[p] for p in moved]
        _adamw(
            group,
            moved,
            [p.grad for p in moved],
            *([state[name] for state in states] for name in (*MOMENTS, "step")),
        )

    def _step_rows(self, group: dict[str, Any]) -> None:
        routes = self._routes
        logits, touched = routes.logits, routes.touched
        if touched is None or touched is not group["params"][0] or logits is None:
            raise InputError(
                "this optimizer no longer trains the routing table: the model's phase, groups or "
                "optimizer were set anew; use the optimizer made last"
            )
        gradient, rows = touched.grad, routes.take_collected()
        if gradient is None or not rows:
            return
        places = self._places_of(rows, logits)
        there = places.to(logits.device)
        values = routes.read(rows)  # not those of `touched`: a row may have been written since
        moments = {name: whole.index_select(0, there) for name, whole in self._moments.items()}
        clocks = list(self._clocks[places].unbind())
        _adamw(
            group,
            list(values.unbind()),
            list(gradient.unbind()),
            *(list(moments[name].unbind()) for name in MOMENTS),
            clocks,
        )
        logits.index_copy_(0, torch.tensor(rows, device=logits.device), values)
        for name, whole in self._moments.items():
            whole.index_copy_(0, there, moments[name])
        self._clocks[places] = torch.stack(clocks)
        touched.data = values

    def _places_of(self, rows: list[int], logits: Tensor) -> Tensor:
        """Where the states of rows are, `[U]`, on the host; new rows get zeros."""
        index = self._routes.state_rows
        assert index is not None
        places = index[rows]
        new = (places < 0).nonzero()[:, 0]
        start, self._used = self._used, self._used + len(new)
        places[new] = torch.arange(start, self._used)
        index[rows] = places
        capacity = len(self._clocks)
        if self._used > capacity:
            # Doubling, so that growing costs a constant per row; but never beyond one per task.
            capacity = max(self._used, min(2 * capacity, len(index)))
        for name, whole in self._moments.items():
            if len(whole) < capacity:
                grown = logits.new_empty(capacity, logits.shape[1])
                grown[:start] = whole[:start]
                self._moments[name] = grown
            self._moments[name][start : self._used] = 0.0
        if len(self._clocks) < capacity:
            self._clocks = torch.cat([self._clocks[:start], torch.zeros(capacity - start)])
        return places

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; those of the rows always go, as the next rows are others."""
        super().zero_grad(set_to_none)
        if self._routes.touched is not None:
            self._routes.touched.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The state as for any torch optimizer, and `table`: that of the rows that have trained."""
        index = self._routes.state_rows
        rows = torch.empty(0, dtype=torch.long) if index is None else (index >= 0).nonzero()[:, 0]
        places = rows if index is None else index[rows]
        table = {name: whole[places.to(whole.device)] for name, whole in self._moments.items()}
        return {
            **super().state_dict(),
            "table": {
                "row": rows,
                "step": self._clocks[places],
                "tasks": 0 if index is None else len(index),
                **table,
            },
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`, for a model with the same tasks in the same order.

        Raises:
            InputError: the state is that of another optimizer, or of a table of another size.
        """
        index, logits = self._routes.state_rows, self._routes.logits
        if index is None or logits is None:
            raise InputError(
                "this optimizer no longer trains the routing table; use the optimizer made last"
            )
        own = dict(state_dict)
        table = own.pop("table", None)
        if table is None:
            raise InputError(
                "this optimizer state has no rows: it was saved by an optimizer that trains the "
                "whole routing table; resume with rowwise_routes as it was"
            )
        rows, shape = table["row"].cpu(), (len(table["row"]), logits.shape[1])
        fits = all(tuple(table[name].shape) == shape for name in MOMENTS)
        if not fits or table["tasks"] != len(index):
            raise InputError(
                f"this optimizer state belongs to another routing table than this one of "
                f"{len(index)} tasks with {logits.shape[1]} numbers each"
            )
        super().load_state_dict(own)
        index.fill_(-1)
        index[rows] = torch.arange(len(rows))
        self._used = len(rows)
        self._moments = {name: table[name].to(logits, copy=True) for name in MOMENTS}
        self._clocks = table["step"].to("cpu", torch.float32, copy=True)


def _adamw(group: dict[str, Any], *tensors: list[Any]) -> None:
    """Torch's own step, in place, for lists of values, gradients, two moments and step counts."""
    values, gradients, first, second, steps = tensors
    adamw(
        values, gradients, first, second, [], steps,
        amsgrad=False, maximize=False, beta1=group["betas"][0], beta2=group["betas"][1],
        lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
    )  # fmt: skip
