"""The routing table: one row of logits per task, found by name."""

import operator
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from polyroute.errors import InputError, did_you_mean

__all__ = ["MU", "MU_ROW", "Routes"]

MU = "mu"
"""The name that stands, wherever a task is asked for, for the average of the inventory."""
MU_ROW = -1

INITIAL_BOUND = 1e-3
"""Fresh logits are uniform within this bound, so a new task starts near the uniform mixture."""


class Routes(nn.Module):
    """Names of tasks and, where tasks are routed by learned logits, a table of them.

    The parameter `logits` is `[T, N * H * K]`: everything that is the task's own lies in one
    contiguous row. It is None where there is nothing to learn: shared and private adapters, and
    inventories that were reduced to their average.

    Args:
        names: tasks, in row order.
        shape: `(N, H, K)`: routers, heads, skills; None for a table without logits.
        device: where the logits live.

    Raises:
        InputError: a name is repeated, empty or reserved.
    """

    def __init__(
        self,
        names: Iterable[str],
        shape: tuple[int, int, int] | None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape
        self._rows: dict[str, int] = {}
        for name in names:
            self._add_name(name)
        self.logits: nn.Parameter | None
        if shape is None:
            self.register_parameter("logits", None)
        else:
            width = shape[0] * shape[1] * shape[2]
            self.logits = nn.Parameter(torch.empty(len(self._rows), width, device=device))
            self.reset_parameters()

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
        """Draw all logits afresh, uniform within 1e-3."""
        if self.logits is not None:
            self.logits.uniform_(-INITIAL_BOUND, INITIAL_BOUND)

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
        """The row of a task, by name or by number; `MU_ROW` for `"mu"`.

        Raises:
            InputError: no such task; the message offers the nearest names.
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
        logits, shape = self._table()
        row = self.row(task)
        if row == MU_ROW:
            return logits.new_zeros(shape)
        return logits.detach()[row].reshape(shape).clone()

    @torch.no_grad()
    def __setitem__(self, task: str | int, values: Tensor) -> None:
        """Overwrite the task's logits; `[N, H, K]` or flat."""
        logits, _ = self._table()
        row = self.row(task)
        if row == MU_ROW:
            raise InputError("'mu' is the uniform mixture and has no logits to write")
        logits[row] = self._flat(values)

    def _table(self) -> tuple[nn.Parameter, tuple[int, int, int]]:
        if self.logits is None or self.shape is None:
            raise InputError("this model has no routing logits: its tasks are not routed")
        return self.logits, self.shape

    def _flat(self, values: Tensor) -> Tensor:
        logits, shape = self._table()
        if tuple(values.shape) != shape and tuple(values.shape) != (logits.shape[1],):
            raise InputError(
                f"a routing row has shape {list(shape)} (routers, heads, skills), "
                f"not {list(values.shape)}"
            )
        return values.reshape(-1).to(logits)

    def gather(self, rows: Tensor) -> Tensor:
        """The logits `[U, N * H * K]` of rows `[U]`, for the mixing of a forward."""
        logits, _ = self._table()
        return logits.index_select(0, rows)

    def add(self, name: str, values: Tensor | None = None) -> int:
        """Append a task; every other row stays as it is.

        Args:
            name: the task.
            values: its logits; fresh ones (uniform within 1e-3) by default.

        Returns:
            The new row's number.
        """
        new = None
        if self.logits is not None:
            new = self.logits.new_empty(1, self.logits.shape[1])
            if values is None:
                new.uniform_(-INITIAL_BOUND, INITIAL_BOUND)
            else:
                new[0] = self._flat(values)
        self._add_name(name)
        if new is not None:
            assert self.logits is not None
            grown = torch.cat([self.logits.detach(), new])
            self.logits = nn.Parameter(grown, requires_grad=self.logits.requires_grad)
        return len(self) - 1

    def keep(self, names: Sequence[str]) -> list[int]:
        """Drop every task but these.

        Returns:
            The former rows of the kept tasks, in their new order.
        """
        rows = [self.row(name) for name in names]
        kept_names = Routes(names, None)._rows  # refuses a repeated name, and "mu"
        if self.logits is not None:
            kept = self.logits.detach()[rows].clone()
            self.logits = nn.Parameter(kept, requires_grad=self.logits.requires_grad)
        self._rows = kept_names
        return rows

    def drop_logits(self) -> None:
        """Forget the logits and keep the names."""
        self.logits = None
        self.shape = None

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"tasks={len(self)}, shape={self.shape}"
