"""Sampling: the examples that an epoch over many tasks visits, and few-shot draws.

Letters: T tasks, N draws in an epoch; n_t examples of task t, m_t = min(n_t, cap).
"""

from collections.abc import Hashable, Iterator, Sequence
from itertools import chain, islice, zip_longest

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from polyroute.errors import InputError
from polyroute.settings import whole

__all__ = ["TaskSampler", "draw_balanced", "draw_few_shot", "some_places"]

Indices = npt.NDArray[np.int64]


class TaskSampler(Sampler[int]):
    """Draws examples from the concatenation of several tasks, by temperature.

    Each draw of an epoch takes task t with probability

        p_t = m_t ** (1 / temperature) / sum_u m_u ** (1 / temperature),  m_t = min(n_t, cap)

    as in T5 (arXiv:1910.10683). The draws are not independent: over an epoch, every group of
    consecutive tasks gets its expected number of draws, rounded up or down at random, and the order
    is shuffled. With `temperature=1` and the default `num_samples`, an epoch therefore has exactly
    m_t draws of task t, and without a cap it visits every example once.

    The examples of a task come in shuffled order and are shuffled again once all of them have been
    drawn. A cap limits how often a task is drawn, but not which of its examples are drawn: each
    epoch may draw others.

    An epoch depends only on `seed` and on the number given to `set_epoch`.

    Args:
        sizes: the number of examples of each task, in the order of concatenation.
        temperature: above 0; 1 draws in proportion to size, `float("inf")` draws all tasks
            equally often.
        cap: a larger task counts as if it had this size; None for no cap.
        num_samples: the number of draws in an epoch; None for the sum of m_t.
        seed: 0 or above.

    Attributes:
        probabilities: p_t for each task; they sum to 1.

    Raises:
        InputError: there is no task, a task is empty, or a number is outside its range.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        temperature: float = 1.0,
        cap: int | None = None,
        num_samples: int | None = None,
        seed: int = 0,
    ) -> None:
        _check_sizes(sizes)
        if not temperature > 0:  # written so that NaN is refused too
            raise InputError(f"the temperature must be above 0, not {temperature}")
        if cap is not None and cap < 1:
            raise InputError(f"the cap must be 1 or more, or None for no cap, not {cap}")
        if num_samples is not None and num_samples < 1:
            raise InputError(f"the number of samples must be 1 or more, not {num_samples}")
        if seed < 0:
            raise InputError(f"the seed must be 0 or more, not {seed}")
        self._sizes: Indices = np.asarray(sizes, dtype=np.int64)
        counted = self._sizes if cap is None else np.minimum(self._sizes, cap)
        self.probabilities = _probabilities(counted, temperature)
        self._num_samples = int(counted.sum()) if num_samples is None else num_samples
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration draws; the first is 0.

        Raises:
            InputError: `epoch` is negative.
        """
        if epoch < 0:
            raise InputError(f"the epoch must be 0 or more, not {epoch}")
        self._epoch = epoch

    def __len__(self) -> int:
        return self._num_samples

    def __iter__(self) -> Iterator[int]:
        # `map` makes one Python integer at a time; `tolist` would make all of them at once.
        return map(int, self._draw())

    def _draw(self) -> Indices:
        """The indices of the epoch, `[N]`."""
        sequence = np.random.SeedSequence(self._seed, spawn_key=(self._epoch,))
        rng = np.random.Generator(np.random.PCG64(sequence))
        counts = _share_out(self._num_samples, self.probabilities, rng)
        starts = np.cumsum(self._sizes) - self._sizes
        by_task = [
            start + _draw_within(size, count, rng)
            for start, size, count in zip(starts, self._sizes, counts, strict=True)
        ]
        order = rng.permutation(np.repeat(np.arange(len(counts)), counts))
        indices = np.empty(self._num_samples, dtype=np.int64)
        # The stable sort lists the places of task 0, then of task 1, ..., each from first to last.
        indices[np.argsort(order, kind="stable")] = np.concatenate(by_task)
        return indices


def draw_few_shot(num_examples: int, shots: int, seed: int) -> list[int]:
    """Draw a few training examples at random, without replacement.

    The seed shuffles all examples, whatever their targets, and the first ones are taken. A larger
    number of shots with the same seed therefore extends the draw. The draw is the same on every
    platform.

    Args:
        num_examples: the size of the training split.
        shots: the number of examples to draw, from 1 to `num_examples`.
        seed: 0 or above.

    Returns:
        Indices from 0 to `num_examples - 1`, in the order drawn.

    Raises:
        InputError: there are fewer examples than shots, or a number is outside its range.
    """
    if shots < 1:
        raise InputError(f"the number of shots must be 1 or more, not {shots}")
    if shots > num_examples:
        raise InputError(
            f"cannot draw {shots} shots from {num_examples} examples; ask for {num_examples} or "
            "fewer, or add examples"
        )
    if seed < 0:
        raise InputError(f"the seed must be 0 or more, not {seed}")
    rng = np.random.Generator(np.random.PCG64(seed))
    drawn: list[int] = rng.permutation(num_examples)[:shots].tolist()
    return drawn


def draw_balanced(classes: Sequence[Hashable], shots: int, seed: int) -> list[int]:
    """Draw a few training examples at random, as many of each class as there can be.

    The seed shuffles all examples, as in `draw_few_shot`. The first of each class are taken, then
    the second of each, and so on; a class that has no more is passed over. A larger number of shots
    with the same seed extends the draw, so what follows the first shots is balanced too.

    Args:
        classes: the class of each example of the training split.
        shots: the number of examples to draw, from 1 to the number of examples.
        seed: 0 or above.

    Returns:
        Indices of examples, in the order drawn.

    Raises:
        InputError: there are fewer examples than shots, or a number is outside its range.
    """
    draw_few_shot(len(classes), shots, seed)  # which checks the numbers
    of_class: dict[Hashable, list[int]] = {}
    for index in draw_few_shot(len(classes), len(classes), seed):
        of_class.setdefault(classes[index], []).append(index)
    rounds = chain.from_iterable(zip_longest(*of_class.values()))
    return list(islice((index for index in rounds if index is not None), shots))


def some_places(num_rows: int, most: int | None) -> Sequence[int]:
    """The places of at most so many rows, the same ones each time, in order; None takes all.

    Raises:
        InputError: the most is no positive whole number.
    """
    most = whole(optional=True)("max_examples", most)
    if most is None or most >= num_rows:
        return range(num_rows)
    found: list[int] = sorted(np.random.default_rng(0).permutation(num_rows)[:most].tolist())
    return found


def _check_sizes(sizes: Sequence[int]) -> None:
    if len(sizes) == 0:
        raise InputError("there is no task to sample from; give at least one")
    for position, size in enumerate(sizes):
        if size < 1:
            raise InputError(
                f"the task at position {position} of {len(sizes)} has no examples; leave it out"
            )


def _probabilities(counted: Indices, temperature: float) -> npt.NDArray[np.float64]:
    """Scale sizes by temperature; in log space, because a power of a size can overflow."""
    logs = np.log(counted)
    shares = np.exp((logs - logs.max()) / temperature)
    scaled: npt.NDArray[np.float64] = shares / shares.sum()
    return scaled


def _share_out(
    num_samples: int, probabilities: npt.NDArray[np.float64], rng: np.random.Generator
) -> Indices:
    """Distribute a number of draws over tasks: their expected shares, rounded at random.

    This is systematic sampling: the tasks lie one after another on a line of length N, and each
    gets as many draws as a comb with unit spacing and a random offset has teeth on it.
    """
    line = np.cumsum(probabilities)
    ends = num_samples * (line / line[-1])
    # The offset stays half a step away from 0 and 1, so that an end that is a whole number except
    # for its last bits is not rounded at random.
    offset = (rng.integers(1 << 20) + 0.5) / (1 << 20)
    teeth: Indices = np.floor(ends + offset).astype(np.int64)
    teeth[1:] -= teeth[:-1].copy()
    return teeth


def _draw_within(size: int, count: int, rng: np.random.Generator) -> Indices:
    """Draw `count` of `size` examples: as many shuffled rounds over all examples as it takes."""
    rounds, rest = divmod(int(count), int(size))
    # If only a small part of a task is drawn, neither line needs memory for the whole task.
    repeated = np.arange(rounds * size, dtype=np.int64).reshape(rounds, size) % size
    whole = rng.permuted(repeated, axis=1).reshape(-1)
    return np.concatenate([whole, rng.choice(size, rest, replace=False)])
