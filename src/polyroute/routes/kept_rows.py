"""Mixed factors by row, for packed rows whose tasks change from forward to forward.

While many answers are generated at once, tasks join the batch and leave it all the time. Mixing all
of them again for each forward would cost more than the forward. So the mixture of each row of the
last batches is kept, and only a new row is mixed. A batch gathers what it needs, or its tokens look
it up where it is kept.

Shape letters: U distinct tasks, B examples, S kept rows, r rank.
"""

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor

from polyroute.layer.factors import KeptFactors, LoRAFactors, PlainFactors, Segments
from polyroute.layer.few_vectors import Places, are_few, can_look_up
from polyroute.routes.index import index_on
from polyroute.routes.ragged import RaggedInventory
from polyroute.routes.tasks import Route

if TYPE_CHECKING:
    from polyroute.routes.mixer import Mixer

__all__ = ["KeptRows"]


class KeptRows:
    """The mixed factors of the rows of the last batches; no more than the largest batch needed."""

    def __init__(self) -> None:
        self._stamp: Any = None
        self._slots: dict[int, int] = {}
        """Where each row is kept; those used last come last."""
        self._logits: Tensor | None = None
        """`[S, N * H * K]`, what each kept row was mixed from."""
        self._bank: list[LoRAFactors] = []
        """For each site, factors `[S, r, d]`."""
        self._last: tuple[Any, Tensor] | None = None
        """The rows of the last batch, and the slot of each example."""
        self._copies: Sequence[LoRAFactors] | None = None
        """What the last batch gathered, if it did."""
        self._in_use: WeakSet[Places] = WeakSet()
        """Those of forwards, also of other threads, that still read what is kept."""
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> "KeptRows":
        return KeptRows()

    def __reduce__(self) -> tuple[type["KeptRows"], tuple[()]]:
        return KeptRows, ()

    def fits(self, route: Route, mixer: "Mixer") -> bool:
        """Whether a batch is of the kind whose tasks change; such a batch has no gradient."""
        inventory = mixer.inventory
        return (
            route.segments is not None
            and len(set(route.rows or ())) > 1
            and inventory.adapter == "lora"
            and inventory.num_sets == 1
            and not isinstance(inventory, RaggedInventory)
            and not mixer.rule.same_for_all(mixer)
        )

    def factors(
        self, route: Route, mixer: "Mixer", dtype: torch.dtype
    ) -> Sequence[LoRAFactors | KeptFactors]:
        """The factors of each site.

        Args:
            route: of a batch that fits.
            mixer: has the skills and the table.
            dtype: the type that the layers compute in.
        """
        rows, segments = route.rows or (), route.segments
        assert segments is not None
        # With gradients, a block of layers may be recomputed after what is kept has changed.
        are_read = (
            are_few(segments)
            and can_look_up(mixer.device, dtype)
            and dtype == mixer.sites[0].dtype  # under autocast layers would gather, one by one
            and not torch.is_grad_enabled()
        )
        # Not in inference mode, because what is kept changes in place later.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            try:
                if are_read:
                    return self._read(rows, segments, mixer, dtype)
                return self._gathered(rows, mixer, dtype)
            except BaseException:
                self._stamp = None  # what was being written may be half done: mix all anew
                raise

    def _read(
        self, rows: Sequence[int], segments: Segments, mixer: "Mixer", dtype: torch.dtype
    ) -> Sequence[KeptFactors]:
        """What is kept, and where each token finds its own."""
        index = self._kept(rows, mixer, dtype)
        places = Places.of(segments.spread(index), self._bank[0].a.shape[1])
        self._in_use.add(places)
        return [KeptFactors(own.a, own.b, index, places) for own in self._bank]

    def _gathered(
        self, rows: Sequence[int], mixer: "Mixer", dtype: torch.dtype
    ) -> Sequence[LoRAFactors]:
        """A copy `[B, r, d]` for each site, made once while batches have the same rows."""
        index = self._kept(rows, mixer, dtype)
        if self._copies is None:
            self._copies = [
                LoRAFactors(own.a.index_select(0, index), own.b.index_select(0, index))
                for own in self._bank
            ]
        return self._copies

    def _kept(self, rows: Sequence[int], mixer: "Mixer", dtype: torch.dtype) -> Tensor:
        """The slot of each example's row, `[B]`; what is not kept is mixed before."""
        skills = [*mixer.inventory.parameters(), *mixer.rule.parameters()]
        stamp = ([(id(p), p._version, p.data_ptr()) for p in skills], mixer.anneal_progress, dtype)
        if self._stamp != stamp:
            self._stamp, self._slots, self._last = stamp, {}, None
        logits = mixer.table.logits
        key = tuple(rows), None if logits is None else (id(logits), logits._version)
        if self._last is None or self._last[0] != key:
            self._copies = None
            self._mix_new(list(dict.fromkeys(rows)), mixer, dtype)
            slots = tuple(self._slots[row] for row in rows)
            self._last = key, index_on(mixer.device, slots)
        return self._last[1]

    def _mix_new(self, rows: Sequence[int], mixer: "Mixer", dtype: torch.dtype) -> None:
        """Mix those rows that are not kept, or were written since."""
        logits = None if mixer.table.logits is None else mixer.table.read(rows)
        known = [i for i, row in enumerate(rows) if row in self._slots]
        if logits is not None and self._logits is not None and known:
            before = self._logits[[self._slots[rows[i]] for i in known]]
            is_same = (before == logits[known]).all(1).tolist()
            # The average and the base model have no row: what is read in its place is another's.
            known = [i for i, same in zip(known, is_same, strict=True) if same or rows[i] < 0]
        for i in known:  # they are used last now
            self._slots[rows[i]] = self._slots.pop(rows[i])
        new = [i for i in range(len(rows)) if i not in known]
        if new:
            mixed = mixer.mix_rows([rows[i] for i in new], dtype)
            slots = [self._slot_for(rows[i], len(rows)) for i in new]
            self._keep(slots, mixed, None if logits is None else logits[new])

    def _slot_for(self, row: int, most: int) -> int:
        """The slot that a row has, or else a free one, or that of the row used longest ago."""
        slot = self._slots.pop(row, None)
        if slot is None and len(self._slots) < max(most, self._size):
            slot = len(self._slots)
        elif slot is None:
            slot = self._slots.pop(next(iter(self._slots)))
        self._slots[row] = slot
        return slot

    @property
    def _size(self) -> int:
        return len(self._bank[0].a) if self._bank else 0

    def _keep(
        self, slots: Sequence[int], mixed: Sequence[PlainFactors], logits: Tensor | None
    ) -> None:
        """Write factors, and the logits that they were mixed from, into slots."""
        size = max(self._size, max(slots) + 1)
        if self._in_use:
            self._bank = [LoRAFactors(own.a.clone(), own.b.clone()) for own in self._bank]
        bank: list[LoRAFactors] = []
        for i, own in enumerate(mixed):
            assert isinstance(own, LoRAFactors)
            a, b = (t.view(len(slots), *t.shape[-2:]) for t in (own.a, own.b))
            kept = self._bank[i] if self._bank else LoRAFactors(a[:0], b[:0])
            pairs = ((a, kept.a), (b, kept.b))
            bank.append(LoRAFactors(*(_written(*pair, slots, size) for pair in pairs)))
        self._bank = bank
        if logits is not None:
            kept_logits = logits[:0] if self._logits is None else self._logits
            self._logits = _written(logits, kept_logits, slots, size)


def _written(new: Tensor, kept: Tensor, slots: Sequence[int], size: int) -> Tensor:
    """Kept tensors `[S, ...]`, grown to a size, with new ones in some slots, in place."""
    if len(kept) < size or kept.dtype != new.dtype or kept.shape[1:] != new.shape[1:]:
        grown = new.new_zeros(size, *new.shape[1:])
        if kept.shape[1:] == new.shape[1:]:
            grown[: len(kept)] = kept
        kept = grown
    return kept.index_copy_(0, index_on(new.device, tuple(slots)), new)
