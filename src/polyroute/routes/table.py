"""The routing table: one row of logits per task, found by name."""

import hashlib
import json
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from polyroute.config import MHRConfig
from polyroute.errors import InputError, did_you_mean
from polyroute.routes.given_rows import flat_rows
from polyroute.routes.index import index_on
from polyroute.routes.nearest import nearest_rows
from polyroute.settings import whole
from polyroute.task_names import check_names

__all__ = ["MU", "MU_ROW", "RoutingTable"]

MU = "mu"
"""The name that stands for the average of the inventory wherever a task is named."""
MU_ROW = -1
"""The number that stands for the average of the inventory in place of a row's."""

INITIAL_BOUND = 1e-3
"""New logits are uniform within this bound, so a new task starts near the uniform mixture."""


class RoutingTable(nn.Module):
    """The names of the tasks and, if learned logits route them, a row of logits for each.

    The parameter `logits` is `[T, N * H * K]`, so one contiguous row holds all logits of a task. It
    is None if there are no logits to learn: for shared and private skills, and in an inventory that
    was reduced to its average.

    Rows are data. `routes["mnli"]` reads a copy `[N, H, K]` and `routes["mnli"] = row` writes; new
    rows are made by plain tensor arithmetic:

        halfway = torch.lerp(model.routes["mnli"], model.routes["qnli"], 0.5)
        model.add_task("between", init=halfway)
        model.routes["mnli"] += 0.1 * (model.routes["qnli"] - model.routes["rte"])

    A table of many tasks can be trained by rows (`RoutedModel.optimizer`). `logits` is then frozen,
    and `touched` trains in its place: an ordinary small parameter that holds the rows of the
    batches since the last step. Its gradient can be clipped, scaled and logged like any other.

    Args:
        names: the tasks, in row order.
        shape: `(N, H, K)`, the numbers of routers, heads and skills; None for no logits.
        like: a tensor of the device and type that the logits get.
        config: decides which weights a row gives, for `nearest`; default: the published method.

    Attributes:
        shape: as given; None after `drop_logits`.
        logits: the table, `[T, N * H * K]`.
        touched: `[U, N * H * K]` while the table is trained by rows, otherwise None.
        state_rows: `[T]` while the table is trained by rows: the place of each row's state in its
            optimizer, -1 for a row that never trained.

    Raises:
        InputError: a name is repeated, empty or reserved.
    """

    def __init__(
        self,
        names: Iterable[str],
        shape: tuple[int, int, int] | None,
        like: Tensor | None = None,
        config: MHRConfig | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape
        self._config = MHRConfig() if config is None else config
        self._rows: dict[str, int] = {}
        for name in names:
            self._add_name(name)
        self.logits: nn.Parameter | None
        if shape is None:
            self.register_parameter("logits", None)
        else:
            width = shape[0] * shape[1] * shape[2]
            size = (len(self._rows), width)
            self.logits = nn.Parameter(torch.empty(size) if like is None else like.new_empty(size))
            self.reset_parameters()
        self.touched: nn.Parameter | None
        self.register_parameter("touched", None)
        self.state_rows: Tensor | None = None
        self._collected: dict[int, int] = {}
        """The rows whose gradient waits for a step, with their places in `touched`."""

    def _add_name(self, name: str) -> None:
        if not isinstance(name, str) or not name:
            raise InputError(f"a task name must be a non-empty string, not {name!r}")
        if name == MU:
            raise InputError(f"task name {MU!r} is reserved for the average of the inventory")
        if name in self._rows:
            raise InputError(f"task {name!r} is given twice; task names must be unique")
        self._rows[name] = len(self._rows)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all logits again, uniform within `route_spread` of the settings."""
        if self.logits is not None:
            spread = self._config.route_spread
            self.logits.uniform_(-spread, spread)

    @torch.no_grad()
    def redraw(self, row: int, seed: int) -> None:
        """Draw one row again, as that of a new task, with the same numbers on every device."""
        logits, _ = self._learned()
        drawn = torch.empty(logits.shape[1])
        generator = torch.Generator().manual_seed(seed)
        logits[row] = drawn.uniform_(-INITIAL_BOUND, INITIAL_BOUND, generator=generator).to(logits)

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks, in row order."""
        return tuple(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def row(self, task: str | int) -> int:
        """The number of a task's row, by name or by number; `MU_ROW` for `"mu"`.

        Raises:
            InputError: there is no such task; the message offers the nearest names.
        """
        if isinstance(task, str):
            if task == MU:
                return MU_ROW
            if task not in self._rows:
                raise InputError(f"unknown task {task!r}: {did_you_mean(task, self._rows)}")
            return self._rows[task]
        if isinstance(task, bool) or not hasattr(task, "__index__"):
            raise InputError(f"a task is a name or a row number, not {task!r}")
        task = operator.index(task)
        if not 0 <= task < len(self._rows):
            raise InputError(
                f"task id {task} is out of range: there are {len(self._rows)} tasks, counted from 0"
            )
        return task

    def __getitem__(self, task: str | int) -> Tensor:
        """A copy of the task's logits, `[N, H, K]`."""
        logits, shape = self._learned()
        row = self.row(task)
        if row == MU_ROW:
            return logits.new_zeros(shape)
        return logits.detach()[row].reshape(shape).clone()

    @torch.no_grad()
    def __setitem__(self, task: str | int, values: Tensor) -> None:
        """Overwrite the task's logits; `[N, H, K]` or flat."""
        logits, _ = self._learned()
        row = self.row(task)
        if row == MU_ROW:
            raise InputError("'mu' is the uniform mixture and has no logits to write")
        logits[row] = self._flat(values)

    def _learned(self) -> tuple[nn.Parameter, tuple[int, int, int]]:
        """The logits and the shape of a row."""
        if self.logits is None or self.shape is None:
            raise InputError("this model has no routing logits, so its tasks have no rows")
        return self.logits, self.shape

    def _flat(self, values: Tensor, count: int | None = None) -> Tensor:
        """One row, flat; or, with a count, one row or as many as that, `[count, N * H * K]`."""
        logits, shape = self._learned()
        return flat_rows(values, shape, logits.dtype, count).to(logits.device)

    def gather(self, rows: Sequence[int]) -> Tensor:
        """The logits `[U, N * H * K]` of rows, with a gradient if the table trains.

        Args:
            rows: numbers of rows; at the place of a `MU_ROW`, which has no row, the result holds
                arbitrary values that must not be used.
        """
        if self.touched is None:
            logits, _ = self._learned()
            return logits.index_select(0, self._index(rows))
        gathered: Tensor = _GatherRows.apply(self.touched, self, tuple(rows))  # type: ignore[no-untyped-call]
        return gathered

    def read(self, rows: Iterable[int]) -> Tensor:
        """A detached copy `[U, N * H * K]` of rows, by number."""
        logits, _ = self._learned()
        return logits.detach().index_select(0, self._index(rows))

    def _index(self, rows: Iterable[int]) -> Tensor:
        logits, _ = self._learned()
        return index_on(logits.device, tuple(max(row, 0) for row in rows))

    # ---------------------------------------------------------------- training by rows

    def train_by_rows(self) -> nn.Parameter:
        """Freeze the table, in place, and train only the rows that batches use.

        Returns:
            `touched`, the parameter that trains.
        """
        logits, _ = self._learned()
        self.train_whole()
        logits.requires_grad_(False)
        logits.grad = None
        self.touched = nn.Parameter(logits.new_empty(0, logits.shape[1]))
        self.state_rows = torch.full((len(self),), -1)
        return self.touched

    def train_whole(self) -> None:
        """Undo `train_by_rows`, in place: the table itself is the parameter again."""
        if self.touched is not None and self.logits is not None:
            self.logits.requires_grad_(self.touched.requires_grad)
        self.touched = self.state_rows = None
        self._collected = {}

    def take_collected(self) -> list[int]:
        """The rows of `touched`, in its order, whose gradients no step has used yet.

        The next backward starts a new collection, even if the gradient is kept, so `touched` never
        holds more than the rows of one step.
        """
        rows = list(self._collected)
        self._collected = {}
        return rows

    def merge_collected(self, merge: Callable[..., tuple[list[int], Tensor | None]]) -> None:
        """Let a function replace what waits for a step: rows, and their gradient `[U, N H K]`."""
        if self.touched is not None:
            gradient, self.touched.grad = self.touched.grad, None
            rows, merged = merge([] if gradient is None else list(self._collected), gradient)
            if merged is not None:
                self._collect(rows, merged)

    def _collect(self, rows: Sequence[int], gradient: Tensor) -> None:
        """Add the gradient of gathered rows to the gradient that waits for the next step."""
        touched = self.touched
        if touched is None:  # training by rows ended between forward and backward
            return
        before = touched.grad
        if before is None:
            self._collected = {}
        known = len(self._collected)
        real = [i for i, row in enumerate(rows) if row != MU_ROW]
        places = [self._collected.setdefault(rows[i], len(self._collected)) for i in real]
        total = gradient.new_zeros(len(self._collected), gradient.shape[1])
        if known and before is not None:
            total[:known] = before
        if len(real) < len(rows):
            gradient = gradient[real]
        total.index_add_(0, torch.tensor(places, dtype=torch.long).to(total.device), gradient)
        touched.grad = None  # torch demands that a gradient has its parameter's shape
        touched.data = self.read(self._collected)
        touched.grad = total

    def digest(self) -> Tensor:
        """A hash of the names and their order for a state dict, `[32]` bytes."""
        total = hashlib.sha256(json.dumps(list(self._rows)).encode())
        return torch.frombuffer(bytearray(total.digest()), dtype=torch.uint8)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + "touched", None)  # a temporary copy of a few rows

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str],
        *rest: Any,
    ) -> None:  # fmt: skip
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        if prefix + "touched" in missing:
            missing.remove(prefix + "touched")

    def nearest(self, task: str | int | Tensor, k: int = 5) -> list[tuple[str, float]]:
        """The tasks that mix skills most like a given one; see `polyroute.routes.nearest`.

        Args:
            task: a name, a row number, or any logits `[N, H, K]` (or flat).
            k: the largest number of tasks to return.

        Returns:
            Up to k pairs of a name and a cosine in -1 to 1, best first, without the task itself.

        Raises:
            InputError: there is no such task, the logits have another shape or are not finite, or
                the model has no routing logits.
        """
        logits, shape = self._learned()
        whole()("k", k)
        own = MU_ROW if isinstance(task, Tensor) else self.row(task)
        row = self._flat(task) if isinstance(task, Tensor) else self[task].reshape(-1)
        table, names = logits.detach().view(-1, *shape), self.names
        found = nearest_rows(table, row.view(shape).to(table), own, self._config, k)
        return [(names[place], cosine) for place, cosine in found]

    # ---------------------------------------------------------------- tasks

    def add(self, names: Sequence[str], values: Tensor | None = None) -> list[int]:
        """Append tasks, in place, with one copy of the table; every other row stays as it is.

        Args:
            names: the tasks.
            values: their logits: one row `[N, H, K]` (or flat) for all, or `[n, ...]` with one for
                each; by default new ones, uniform within 1e-3.

        Returns:
            The numbers of the new rows.

        Raises:
            InputError: a name is repeated, reserved or cannot be one, or the values are no rows.
        """
        check_names(names, self._rows)
        new = None
        if self.logits is not None:
            new = self.logits.new_empty(len(names), self.logits.shape[1])
            if values is None:
                new.uniform_(-INITIAL_BOUND, INITIAL_BOUND)
            else:
                new.copy_(self._flat(values, len(names)))
        before = len(self)
        try:
            for name in names:
                self._add_name(name)
        except InputError:
            for name in list(self._rows)[before:]:
                del self._rows[name]
            raise
        if new is not None:
            assert self.logits is not None
            grown = torch.cat([self.logits.detach(), new])
            self.logits = nn.Parameter(grown, requires_grad=self.logits.requires_grad)
        if self.state_rows is not None:
            self.state_rows = torch.cat([self.state_rows, torch.full((len(names),), -1)])
        return list(range(before, len(self)))

    def keep(self, names: Sequence[str]) -> list[int]:
        """Drop all other tasks, in place.

        Returns:
            The former row numbers of the kept tasks, in their new order.

        Raises:
            InputError: a name is unknown or repeated.
        """
        rows = [self.row(name) for name in names]
        kept_names = RoutingTable(names, None)._rows  # refuses a repeated name, and "mu"
        if self.logits is not None:
            kept = self.logits.detach()[rows].clone()
            self.logits = nn.Parameter(kept, requires_grad=self.logits.requires_grad)
        if self.touched is not None and self.state_rows is not None:
            self.state_rows = self.state_rows[rows]
            self._collected, self.touched.grad = {}, None  # they refer to the former numbers
        self._rows = kept_names
        return rows

    def drop_logits(self) -> None:
        """Drop the logits, in place, and keep the names."""
        self.train_whole()
        self.logits = None
        self.shape = None

    def extra_repr(self) -> str:
        """The text that `print(model)` shows for the table."""
        return f"tasks={len(self)}, shape={self.shape}"


class _GatherRows(torch.autograd.Function):
    """Rows of a frozen table, as a function of a parameter whose value it does not use.

    Because of the parameter, `touched`, autograd calls backward with the gradient of the rows. A
    step may have several forwards, so its rows are known only after the last one. Backward
    therefore collects rows and gradients in the table, instead of returning a gradient for
    `touched`, whose shape changes.
    """

    @staticmethod
    def forward(ctx: Any, touched: Tensor, table: RoutingTable, rows: tuple[int, ...]) -> Tensor:
        ctx.table, ctx.rows, ctx.names = table, rows, table._rows
        return table.read(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        if ctx.names is ctx.table._rows:  # otherwise `keep` has given the rows other numbers
            ctx.table._collect(ctx.rows, gradient)
        return None, None, None
