"""The open route: which block of the caller a forward belongs to, and what its layers apply.

A route belongs to the block that opened it, not to the thread. Coroutines and generators of one
thread take turns, so the block that was opened last need not be the one that runs now. The block
is found by looking up the call stack for the nearest function that has one open. Where there is
none, because the block was opened by a function that has returned, or by a coroutine that started
this one, the last block of the context counts, except one that a suspended generator has open.
"""

import inspect
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from polyroute.layer.factors import Factors, Segments

__all__ = ["BASE_ALONE", "Block", "Mixture", "OpenRoutes", "Recomputation"]

GENERATORS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
SUSPENDABLE = GENERATORS | inspect.CO_COROUTINE
WRAPPERS = ("contextlib", "torch._dynamo", "torch.compiler", "torch.utils._contextlib")

_open_blocks: ContextVar[tuple["Block", ...]] = ContextVar("polyroute_open_blocks", default=())
"""The blocks that are open in this context, of all models, in the order of their opening."""


@dataclass(frozen=True)
class Mixture:
    """What the layers of one forward apply; never changed once made."""

    factors: Sequence[Factors]
    """By site; empty where the base model runs alone."""
    num_examples: int | None
    """B where examples differ, None where one task holds for all."""
    segments: Segments | None = None
    """Where the rows of the batch hold several examples each: where these begin and end."""
    media_fit: bool = False
    """Whether the images and sounds of the batch are known to be as many for every example."""


BASE_ALONE = Mixture((), None)


class OpenRoutes(threading.local):
    """The open routes of a model; one object shared by all of its routed layers.

    What a running forward applies is the thread's own, since a forward is never interrupted by
    another one of its thread. Which block a forward belongs to is found by `now`.

    Attributes:
        mixture: what the layers of the running forward apply; None between forwards.
        prepared_by: the layer that prepared the mixture because a part of the model was called on
            its own. When that layer is reached again, it is another forward.
        prepared_for: the block for which it did.
        media_fit: what `Mixture.media_fit` is for parts that the running generation calls alone.
        is_recomputing: whether backward recomputes a block of layers under its own mixture.
        running: what a forward was given without a block.
    """

    def __init__(self, prepare: Callable[[], Mixture] | None = None) -> None:
        self.prepare = prepare
        self.mixture: Mixture | None = None
        self.prepared_by: int | None = None
        self.prepared_for: Block | None = None
        self.is_recomputing = False
        self.media_fit = False
        self.running: list[Any] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "OpenRoutes":
        return OpenRoutes()

    def __reduce__(self) -> tuple[type["OpenRoutes"], tuple[()]]:
        return OpenRoutes, ()

    def open(self, value: Any) -> "Block":
        """A block that opens a route, for a `with` statement."""
        return Block(self, value)

    def now(self) -> "Block | None":
        """The block that the calling code is in; None outside of all blocks."""
        blocks = [b for b in _open_blocks.get() if b.owner is self and b.is_open]
        if not blocks:
            return None
        if len(blocks) == 1 and not blocks[0].is_generators:
            return blocks[0]
        by_frame = {block.frame: block for block in blocks}  # the last one of each frame
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if id(frame) in by_frame:
                return by_frame[id(frame)]
            frame = frame.f_back
        return next((block for block in reversed(blocks) if not block.is_generators), None)

    def forget(self) -> None:
        """Forget what was mixed: a part that is called next mixes anew."""
        self.mixture = self.prepared_by = self.prepared_for = None


class Block(AbstractContextManager[None]):
    """A block of code in which a route is open.

    It closes after an error too, blocks nest, and they may end in any order: leaving one removes
    its own entry alone. A block may be entered again, also inside itself.
    """

    def __init__(self, owner: OpenRoutes, value: Any) -> None:
        self.owner = owner
        self.value = value
        self.frame = 0
        self.is_generators = False
        self.is_open = False
        self.held: FrameType | None = None
        self._entries: list[Block] = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __enter__(self) -> None:
        entry = Block(self.owner, self.value)
        frame = _opener(sys._getframe(1))
        entry.frame = id(frame)
        if frame is not None and not frame.f_code.co_flags & SUSPENDABLE:
            # A frame that is gone could give its identity to another. Generators and coroutines
            # close their blocks when they go, and would not go if they were held.
            entry.held = frame
        entry.is_generators = frame is not None and bool(frame.f_code.co_flags & GENERATORS)
        entry.is_open = True
        self._entries.append(entry)
        _open_blocks.set((*(b for b in _open_blocks.get() if b.is_open), entry))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __exit__(self, *_: object) -> None:
        frame = _opener(sys._getframe(1))
        own = [entry for entry in self._entries if entry.frame == id(frame)]
        entry = (own or self._entries)[-1]
        self._entries.remove(entry)
        entry.held = None
        entry.is_open = False  # it may be left in another context than the one it was entered in
        _open_blocks.set(tuple(b for b in _open_blocks.get() if b.is_open))


def _opener(frame: FrameType | None) -> FrameType | None:
    """The function whose `with` statement this is, past wrappers made by contextlib and torch.

    A function decorated with `contextmanager` opens a block for its caller: the code inside the
    caller's `with` runs while that function is suspended.
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
    """Lets a block of layers that backward recomputes apply the mixture of its forward."""

    def __init__(self, routes: OpenRoutes) -> None:
        self.routes = routes
        self.mixture = routes.mixture
        self._outer: list[tuple[Any, ...]] = []

    def __enter__(self) -> None:
        state = self.routes
        self._outer.append(
            (state.mixture, state.prepared_by, state.prepared_for, state.is_recomputing)
        )
        state.forget()
        state.mixture, state.is_recomputing = self.mixture, True

    def __exit__(self, *_: object) -> None:
        state = self.routes
        state.mixture, state.prepared_by, state.prepared_for, state.is_recomputing = (
            self._outer.pop()
        )
