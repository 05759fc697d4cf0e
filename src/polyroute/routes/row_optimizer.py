"""AdamW for an inventory whose routing table is trained by rows.

Skills take the steps of `torch.optim.AdamW`. In the table every row is a parameter of its own, with
its own moments, bias correction and weight decay, and with a step count of its own that grows only
at steps whose batch contains the row. Therefore

- a row that is in every batch moves exactly as under `torch.optim.AdamW`;
- a row that is in some batches moves exactly as if `torch.optim.AdamW` had run on these steps
  alone.

This is the only difference. At a step whose batch lacks a row, dense AdamW would also move the row
by its momentum, decay it and shrink its moments. The cost of a step depends on the rows of its
batch, not on the size of the table, and only rows that have trained take memory for their moments.
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
    """AdamW with a step count for each row of the routing table; made by `RoutedModel.optimizer`.

    Gradients accumulate over forwards and backwards until `step` uses them. Tasks may be added and
    dropped between steps. `state_dict` holds the whole state, by row number, with moments
    `[n, N * H * K]` of the n rows that have trained.

    Args:
        groups: as `RoutedModel.param_groups` makes them; the last one is named `routes`, and its
            parameter is `table.touched`.
        table: the routing table, trained by rows.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        table: RoutingTable,
        *,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        self._table = table
        width = groups[-1]["params"][0].shape[1]
        self._moments = {name: torch.empty(0, width) for name in MOMENTS}
        """Both moments, `[C, N * H * K]`, with C places for rows."""
        self._clocks = torch.empty(0)
        """The step counts, `[C]`, on the host as those of torch are."""
        self._used = 0
        """The number of places that are taken, which are the first ones."""
        super().__init__(groups, {"betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the skills, and the rows with a gradient since the last step.

        Args:
            closure: computes the loss and its gradients again, as for any torch optimizer.

        Raises:
            InputError: the model's phase, parameter groups or optimizer were set again since.
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
        table = self._table
        logits, touched = table.logits, table.touched
        if touched is None or touched is not group["params"][0] or logits is None:
            raise InputError(
                "this optimizer no longer trains the routing table, because the model's phase, "
                "groups or optimizer were set again: use the optimizer made last"
            )
        gradient, rows = touched.grad, table.take_collected()
        if gradient is None or not rows:
            return
        places = self._places_of(rows, logits)
        on_device = places.to(logits.device)
        values = table.read(rows)  # `touched` may be out of date: rows can be written meanwhile
        moments = {name: whole.index_select(0, on_device) for name, whole in self._moments.items()}
        steps = list(self._clocks[places].unbind())
        _adamw(
            group,
            list(values.unbind()),
            list(gradient.unbind()),
            *(list(moments[name].unbind()) for name in MOMENTS),
            steps,
        )
        logits.index_copy_(0, torch.tensor(rows, device=logits.device), values)
        for name, whole in self._moments.items():
            whole.index_copy_(0, on_device, moments[name])
        self._clocks[places] = torch.stack(steps)
        touched.data = values

    def _places_of(self, rows: list[int], logits: Tensor) -> Tensor:
        """The places of the states of rows, `[U]`, on the host; new rows get a state of zeros."""
        index = self._table.state_rows
        assert index is not None
        places = index[rows]
        new = (places < 0).nonzero()[:, 0]
        start, self._used = self._used, self._used + len(new)
        places[new] = torch.arange(start, self._used)
        index[rows] = places
        capacity = len(self._clocks)
        if self._used > capacity:
            # Doubling keeps the cost of growth constant per row. There is at most a place per task.
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
        """Drop the gradients.

        Those of rows are dropped even with `set_to_none=False`, because the next batch has others.
        """
        super().zero_grad(set_to_none)
        if self._table.touched is not None:
            self._table.touched.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The state of any torch optimizer and, as `table`, the state of the rows that trained."""
        index = self._table.state_rows
        rows = torch.empty(0, dtype=torch.long) if index is None else (index >= 0).nonzero()[:, 0]
        places = rows if index is None else index[rows]
        moments = {name: whole[places.to(whole.device)] for name, whole in self._moments.items()}
        return {
            **super().state_dict(),
            "table": {
                "row": rows,
                "step": self._clocks[places],
                "tasks": 0 if index is None else len(index),
                **moments,
            },
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`, for a model with the same tasks in the same order.

        Raises:
            InputError: the state is that of another optimizer, or of a table of another size.
        """
        index, logits = self._table.state_rows, self._table.logits
        if index is None or logits is None:
            raise InputError(
                "this optimizer no longer trains the routing table: use the optimizer made last"
            )
        others = dict(state_dict)
        saved = others.pop("table", None)
        if saved is None:
            raise InputError(
                "this optimizer state has no rows, because it was saved by an optimizer that "
                "trains the whole routing table: resume with the same rowwise_routes"
            )
        rows, shape = saved["row"].cpu(), (len(saved["row"]), logits.shape[1])
        fits = all(tuple(saved[name].shape) == shape for name in MOMENTS)
        if not fits or saved["tasks"] != len(index):
            raise InputError(
                f"this optimizer state belongs to another routing table than this one of "
                f"{len(index)} tasks with {logits.shape[1]} numbers each: load it into a model "
                "with the tasks and sizes of its own"
            )
        super().load_state_dict(others)
        index.fill_(-1)
        index[rows] = torch.arange(len(rows))
        self._used = len(rows)
        self._moments = {name: saved[name].to(logits, copy=True) for name in MOMENTS}
        self._clocks = saved["step"].to("cpu", torch.float32, copy=True)


def _adamw(group: dict[str, Any], *tensors: list[Any]) -> None:
    """Take torch's own step, in place: lists of values, gradients, both moments and step counts."""
    values, gradients, first, second, steps = tensors
    adamw(
        values, gradients, first, second, [], steps,
        amsgrad=False, maximize=False, beta1=group["betas"][0], beta2=group["betas"][1],
        lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
    )  # fmt: skip
