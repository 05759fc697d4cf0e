"""The open route: which block of the caller a forward belongs to, and what its layers apply.

A route belongs to the block that opened it, not to the thread. Coroutines and generators of one
thread take turns, so the block that was opened last is not always the one that runs now. A block is
therefore found by the call stack: it holds for the function that opened it and, once that function
has returned, for its callers. A generator or a coroutine opens blocks for itself alone. Threads and
tasks that are started inside a block with a copy of its context are inside it too.
"""

import inspect
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from polyroute.layer.factors import Factors, Segments

__all__ = ["BASE_ALONE", "Block", "Mixture", "OpenRoutes", "Recomputation", "is_in_backward"]

GENERATORS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
SUSPENDABLE = GENERATORS | inspect.CO_COROUTINE
WRAPPERS = ("contextlib", "torch._dynamo", "torch.compiler", "torch.utils._contextlib")

_open_blocks: ContextVar[tuple["Block", ...]] = ContextVar("polyroute_open_blocks", default=())
"""The open blocks of all models in this context, in the order in which they were opened."""


@dataclass(frozen=True)
class Mixture:
    """What the layers of one forward apply; never changed once made."""

    factors: Sequence[Factors]
    """The factors of each site; empty if the base model runs alone."""
    num_examples: int | None
    """The number B of examples if they differ; None if one mixture serves the whole batch."""
    segments: Segments | None = None
    """Where the examples begin and end, if the sequences of the batch pack several each."""
    media_fit: bool = False
    """Whether every example is known to have as many images and sounds as every other."""


BASE_ALONE = Mixture((), None)


def is_in_backward() -> bool:
    """Whether this thread is running backward, so that a layer called now is being recomputed."""
    return torch._C._current_graph_task_id() != -1


class OpenRoutes(threading.local):
    """The open routes of a model; all of its routed layers share this object.

    Each thread has its own values of the attributes, since no forward interrupts another one of
    the same thread. `now` finds the block that a forward belongs to.

    Args:
        prepare: makes the mixture for a part of the model that is called on its own.

    Attributes:
        mixture: what the layers of the running forward apply; None between forwards.
        prepared_by: the index of the layer that prepared the mixture because a part of the model
            was called on its own. When that layer is called again, another forward has begun.
        prepared_for: the block that was open when that layer prepared the mixture.
        generating: the inputs of the running generation, by name; None outside of one. They stand
            for those of the parts that it calls on their own.
        is_recomputing: whether backward recomputes a block of layers under its own mixture.
        running: what the running forwards were given without a block, innermost last.
    """

    def __init__(self, prepare: Callable[[], Mixture] | None = None) -> None:
        self.prepare = prepare
        self.mixture: Mixture | None = None
        self.prepared_by: int | None = None
        self.prepared_for: Block | None = None
        self.is_recomputing = False
        self.generating: Mapping[str, Any] | None = None
        self.running: list[Any] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "OpenRoutes":
        return OpenRoutes()

    def __reduce__(self) -> tuple[type["OpenRoutes"], tuple[()]]:
        return OpenRoutes, ()

    def open(self, value: Any) -> "Block":
        """A block that opens a route in a `with` statement; `value` says what it routes."""
        return Block(self, value)

    def now(self) -> "Block | None":
        """The block that the calling code is in; None outside all blocks."""
        blocks = [b for b in _open_blocks.get() if b.owner is self and b.is_open]
        if not blocks or (len(blocks) == 1 and not blocks[0].is_suspendable):
            return blocks[0] if blocks else None
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            number = id(frame)
            for block in reversed(blocks):
                if number in block.chain:
                    return block
            frame = frame.f_back
        # No function that opened one of the blocks is running here. A block of a suspended
        # generator or coroutine holds only for tasks and threads that it started.
        strand = _strand()
        inherited = (b for b in reversed(blocks) if not b.is_suspendable or b.strand != strand)
        return next(inherited, None)

    def forget(self) -> None:
        """Drop the mixture, so that a part of the model that is called next mixes again."""
        self.mixture = self.prepared_by = self.prepared_for = None


class Block(AbstractContextManager[None]):
    """A block of code in which a route is open.

    A block also closes after an error. Blocks nest, and they may end in any order, because leaving
    one removes only its own entry. A block may be entered again, even inside itself.
    """

    def __init__(self, owner: OpenRoutes, value: Any) -> None:
        self.owner = owner
        self.value = value
        self.is_open = False
        self.chain: tuple[int, ...] = ()
        self.is_suspendable = False
        self.strand: tuple[int, int] = (0, 0)
        self._held: tuple[FrameType, ...] = ()
        self._entries: list[Block] = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __enter__(self) -> None:
        entry = Block(self.owner, self.value)
        frames = _chain(_opener(sys._getframe(1)))
        entry.chain = tuple(map(id, frames))
        entry.is_suspendable = bool(frames) and _is_suspendable(frames[-1])
        entry.strand = _strand()
        # Hold the frames: once freed, the id of one could pass to another. Generators and
        # coroutines close their blocks when they are freed, and would never be freed if held.
        entry._held = tuple(frames[:-1] if entry.is_suspendable else frames)
        entry.is_open = True
        self._entries.append(entry)
        _open_blocks.set((*(b for b in _open_blocks.get() if b.is_open), entry))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __exit__(self, *_: object) -> None:
        opener = id(_opener(sys._getframe(1)))
        own = [entry for entry in self._entries if entry.chain[:1] == (opener,)]
        entry = (own or self._entries)[-1]
        self._entries.remove(entry)
        entry._held = ()
        entry.is_open = False  # the context that is left need not be the one that was entered
        _open_blocks.set(tuple(b for b in _open_blocks.get() if b.is_open))


def _chain(frame: FrameType | None) -> list[FrameType]:
    """A function and its callers, up to the first that can be suspended."""
    found = []
    while frame is not None:
        found.append(frame)
        if _is_suspendable(frame):
            break
        frame = frame.f_back
    return found


def _is_suspendable(frame: FrameType) -> bool:
    return bool(frame.f_code.co_flags & SUSPENDABLE)


def _strand() -> tuple[int, int]:
    """What runs code one after another: the thread, and in asyncio the task."""
    task: Any = None
    asyncio = sys.modules.get("asyncio")  # where nobody imported it, no loop runs
    if asyncio is not None and asyncio._get_running_loop() is not None:
        task = asyncio.current_task()
    return threading.get_ident(), id(task)


def _opener(frame: FrameType | None) -> FrameType | None:
    """The function whose `with` statement this is, found past wrappers of contextlib and torch.

    A function decorated with `contextmanager` opens a block for its caller: it is suspended while
    the code inside the caller's `with` runs.
    """
    while frame is not None:
        back = frame.f_back
        opens_for_caller = frame.f_code.co_flags & GENERATORS and _module(back) == "contextlib"
        if not opens_for_caller and not _module(frame).startswith(WRAPPERS):
            return frame
        frame = back
    return None


def _module(frame: FrameType | None) -> str:
    return "" if frame is None else str(frame.f_globals.get("__name__", ""))


class Recomputation(AbstractContextManager[None]):
    """Makes layers that backward recomputes apply the mixture of their forward."""

    KEPT = ("mixture", "prepared_by", "prepared_for", "is_recomputing")
    """The attributes of the open routes that are restored afterwards."""

    def __init__(self, open_routes: OpenRoutes) -> None:
        self.open_routes = open_routes
        self.mixture = open_routes.mixture
        self._outer: list[tuple[Any, ...]] = []

    def __enter__(self) -> None:
        self._outer.append(tuple(getattr(self.open_routes, name) for name in self.KEPT))
        self.open_routes.forget()
        self.open_routes.mixture, self.open_routes.is_recomputing = self.mixture, True

    def __exit__(self, *_: object) -> None:
        for name, value in zip(self.KEPT, self._outer.pop(), strict=True):
            setattr(self.open_routes, name, value)
