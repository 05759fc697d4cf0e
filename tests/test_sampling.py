from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from polyroute.data.sampling import TaskSampler, draw_balanced, draw_few_shot
from polyroute.errors import InputError

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=8)
TEMPERATURES = st.one_of(st.floats(0.05, 20), st.just(1.0), st.just(float("inf")))
CAPS = st.one_of(st.none(), st.integers(1, 50))
EPOCHS = st.integers(0, 1000)


def by_task(indices: list[int], sizes: list[int]) -> list[list[int]]:
    """The draws of each task in the order drawn, counted from the task's first example."""
    drawn: list[list[int]] = [[] for _ in sizes]
    ends = np.cumsum(sizes)
    for index in indices:
        task = int(np.searchsorted(ends, index, side="right"))
        drawn[task].append(index - int(ends[task]) + sizes[task])
    return drawn


def reference_probabilities(sizes: list[int], temperature: float, cap: int | None) -> list[float]:
    powers = [min(n, cap or n) ** (1 / temperature) for n in sizes]
    return [power / sum(powers) for power in powers]


@given(SIZES, TEMPERATURES, CAPS, st.integers(1, 200), EPOCHS)
def test_an_epoch_has_the_asked_length_and_indices_in_range(
    sizes: list[int], temperature: float, cap: int | None, num_samples: int, epoch: int
) -> None:
    sampler = TaskSampler(sizes, temperature=temperature, cap=cap, num_samples=num_samples)
    sampler.set_epoch(epoch)
    indices = list(sampler)
    assert len(indices) == len(sampler) == num_samples
    assert all(type(index) is int and 0 <= index < sum(sizes) for index in indices)


@given(SIZES, TEMPERATURES, CAPS, st.integers(0, 2**40), EPOCHS)
def test_an_epoch_depends_on_seed_and_epoch_alone(
    sizes: list[int], temperature: float, cap: int | None, seed: int, epoch: int
) -> None:
    used = TaskSampler(sizes, temperature=temperature, cap=cap, seed=seed)
    list(used)
    used.set_epoch(epoch + 1)
    list(used)
    used.set_epoch(epoch)
    fresh = TaskSampler(sizes, temperature=temperature, cap=cap, seed=seed)
    fresh.set_epoch(epoch)
    assert list(used) == list(used) == list(fresh)


def test_seeds_and_epochs_give_different_orders() -> None:
    orders = set()
    # 2**32 + 1 and 1 share their low word, which must not make them share epochs.
    for seed in (0, 1, 2**32, 2**32 + 1):
        for epoch in range(3):
            sampler = TaskSampler([30, 20], seed=seed)
            sampler.set_epoch(epoch)
            orders.add(tuple(sampler))
    assert len(orders) == 12


@given(SIZES, TEMPERATURES, CAPS, st.integers(1, 300), EPOCHS)
def test_no_example_comes_again_before_its_task_is_exhausted(
    sizes: list[int], temperature: float, cap: int | None, num_samples: int, epoch: int
) -> None:
    sampler = TaskSampler(sizes, temperature=temperature, cap=cap, num_samples=num_samples)
    sampler.set_epoch(epoch)
    for size, drawn in zip(sizes, by_task(list(sampler), sizes), strict=True):
        for start in range(0, len(drawn), size):
            once = drawn[start : start + size]
            assert len(set(once)) == len(once)


def test_an_exhausted_task_is_shuffled_anew() -> None:
    indices = list(TaskSampler([50], num_samples=150))
    assert len({tuple(indices[start : start + 50]) for start in (0, 50, 100)}) == 3


@given(SIZES, TEMPERATURES, CAPS)
def test_the_probabilities_are_powers_of_capped_sizes(
    sizes: list[int], temperature: float, cap: int | None
) -> None:
    probabilities = TaskSampler(sizes, temperature=temperature, cap=cap).probabilities
    expected = reference_probabilities(sizes, temperature, cap)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-9, atol=1e-300)


@given(SIZES, TEMPERATURES, CAPS, st.integers(1, 500), EPOCHS)
def test_each_task_gets_its_expected_draws_rounded_up_or_down(
    sizes: list[int], temperature: float, cap: int | None, num_samples: int, epoch: int
) -> None:
    sampler = TaskSampler(sizes, temperature=temperature, cap=cap, num_samples=num_samples)
    sampler.set_epoch(epoch)
    expected = num_samples * np.array(reference_probabilities(sizes, temperature, cap))
    counts = np.array([len(drawn) for drawn in by_task(list(sampler), sizes)])
    assert np.all(np.abs(counts - expected) < 1 + 1e-5)


@settings(max_examples=5)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=5), TEMPERATURES, st.integers(0, 99))
def test_over_many_epochs_each_task_comes_as_often_as_its_probability_says(
    sizes: list[int], temperature: float, seed: int
) -> None:
    sampler = TaskSampler(sizes, temperature=temperature, num_samples=3, seed=seed)
    counts = np.zeros(len(sizes))
    for epoch in range(1000):
        sampler.set_epoch(epoch)
        counts += [len(drawn) for drawn in by_task(list(sampler), sizes)]
    # Rounding has a standard deviation of at most 1/2 an epoch: 5 deviations of the mean share.
    tolerance = 5 * 0.5 / 1000**0.5 / 3
    expected = reference_probabilities(sizes, temperature, None)
    np.testing.assert_allclose(counts / counts.sum(), expected, atol=tolerance)


@given(SIZES, EPOCHS)
def test_a_plain_epoch_visits_every_example_once(sizes: list[int], epoch: int) -> None:
    sampler = TaskSampler(sizes)
    sampler.set_epoch(epoch)
    assert sorted(sampler) == list(range(sum(sizes)))


@given(SIZES, st.integers(1, 50), EPOCHS)
def test_a_capped_epoch_draws_no_task_more_often_than_the_cap(
    sizes: list[int], cap: int, epoch: int
) -> None:
    sampler = TaskSampler(sizes, cap=cap)
    sampler.set_epoch(epoch)
    counts = [len(drawn) for drawn in by_task(list(sampler), sizes)]
    assert counts == [min(size, cap) for size in sizes]


def test_a_cap_does_not_hide_examples_from_later_epochs() -> None:
    sampler = TaskSampler([30, 5], cap=5)
    seen: set[int] = set()
    for epoch in range(100):
        sampler.set_epoch(epoch)
        seen.update(sampler)
    assert seen == set(range(35))


@given(SIZES, st.integers(1, 20))
def test_infinite_temperature_draws_all_tasks_equally_often(sizes: list[int], each: int) -> None:
    sampler = TaskSampler(sizes, temperature=float("inf"), num_samples=each * len(sizes))
    assert [len(drawn) for drawn in by_task(list(sampler), sizes)] == [each] * len(sizes)


def test_tasks_are_mixed_within_an_epoch() -> None:
    first_half = list(TaskSampler([500, 500]))[:500]
    assert 200 < sum(index < 500 for index in first_half) < 300


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1e6])
def test_extreme_sizes_and_temperatures_do_not_overflow(temperature: float) -> None:
    sampler = TaskSampler([1, 10**12], temperature=temperature, num_samples=100)
    assert np.isfinite(sampler.probabilities).all()
    assert len(list(sampler)) == 100


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**40))
def test_a_few_shot_draw_is_the_start_of_a_shuffle(
    num_examples: int, shots: int, seed: int
) -> None:
    assume(shots <= num_examples)
    drawn = draw_few_shot(num_examples, shots, seed)
    everything = draw_few_shot(num_examples, num_examples, seed)
    assert drawn == everything[:shots]
    assert sorted(everything) == list(range(num_examples))
    assert all(type(index) is int for index in drawn)


CLASSES = st.lists(st.integers(0, 3), min_size=1, max_size=60)


@given(CLASSES, st.integers(1, 60), st.integers(0, 2**40))
def test_a_balanced_draw_has_as_many_of_each_class_as_there_can_be(
    classes: list[int], number: int, seed: int
) -> None:
    shots = 1 + number % len(classes)
    drawn = draw_balanced(classes, shots, seed)
    everything = draw_balanced(classes, len(classes), seed)
    assert drawn == everything[:shots]
    assert sorted(everything) == list(range(len(classes)))
    there, counts = Counter(classes), Counter(classes[index] for index in drawn)
    # Where a class has fewer than another, it has no more or is at most one behind.
    most = max(counts.values())
    assert all(counts[one] >= min(there[one], most - 1) for one in there)
    # Within a class the order is that of the plain draw.
    plain = draw_few_shot(len(classes), len(classes), seed)
    for one in there:
        assert [i for i in everything if classes[i] == one] == [
            i for i in plain if classes[i] == one
        ]


def test_every_example_is_as_likely_in_a_few_shot_draw() -> None:
    counts = Counter(index for seed in range(2000) for index in draw_few_shot(10, 3, seed))
    # 600 expected of each, with a standard deviation of 20.5.
    assert all(abs(counts[index] - 600) < 100 for index in range(10))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": []}, "no task to sample from"),
        ({"sizes": [3, 0]}, "position 1 of 2 has no examples"),
        ({"sizes": [3, -1]}, "position 1 of 2 has no examples"),
        ({"sizes": [3], "temperature": 0.0}, "temperature must be above 0, not 0.0"),
        ({"sizes": [3], "temperature": -1.0}, "temperature must be above 0, not -1.0"),
        ({"sizes": [3], "temperature": float("nan")}, "temperature must be above 0, not nan"),
        ({"sizes": [3], "cap": 0}, "cap must be 1 or more, or None for no cap, not 0"),
        ({"sizes": [3], "num_samples": 0}, "number of samples must be 1 or more, not 0"),
        ({"sizes": [3], "seed": -1}, "seed must be 0 or more, not -1"),
    ],
)
def test_a_sampler_refuses_what_it_cannot_draw(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TaskSampler(**arguments)  # type: ignore[arg-type]


def test_a_negative_epoch_is_refused() -> None:
    with pytest.raises(InputError, match="epoch must be 0 or more, not -1"):
        TaskSampler([3]).set_epoch(-1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 6, 0), "cannot draw 6 shots from 5 examples"),
        ((0, 1, 0), "cannot draw 1 shots from 0 examples"),
        ((5, 0, 0), "shots must be 1 or more, not 0"),
        ((5, 5, -1), "seed must be 0 or more, not -1"),
    ],
)
def test_a_few_shot_draw_refuses_what_it_cannot_draw(
    arguments: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        draw_few_shot(*arguments)
