"""Step times of this version relative to another one, interleaved: did a change cost anything?

    python benchmarks/against.py OTHER_SRC [--cases NAME ...] [--seconds 60] [--threads 2]

OTHER_SRC is the folder `src` of another checkout. Both versions run in one process, on the same
weights of the base model, with the same skills, routes and batch. They take turns call by call, in
the order A B, B A, .... Processes of their own would not do: the same code is up to 5 % faster in
one process than in another, because its memory lies elsewhere. Printed are medians, the median of
the ratio within a pair, and its interval of 95 % by bootstrap.
"""

import argparse
import gc
import importlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import Case, all_cases

HERE = Path(__file__).parent
CASES = (
    "t5-b16-u1", "t5-b16-u16", "llama-b16-u1", "llama-b16-u4", "llama-b16-u16", "t5-d64-b4-u4",
    "llama-d64-b4-u4", "t5-generate-b8-u4", "llama-generate-b8-u4",
)  # fmt: skip


class Version:
    """One version of the package, and what is timed of it."""

    def __init__(self, source: Path) -> None:
        names = ("polyroute", "contenders")
        for name in [n for n in sys.modules if n.partition(".")[0] in names]:
            del sys.modules[name]
        sys.path.insert(0, str(source))
        self.contenders: Any = importlib.import_module("contenders")
        del sys.path[0]
        found = self.contenders.polyroute.__file__
        assert Path(found).is_relative_to(source), f"{found} is not in {source}"

    def call(self, case: Case, base: Any) -> Callable[[], Any]:
        """The call of a case."""
        its = self.contenders
        skills, heads = case.settings[0]
        poly = its.build_poly(case, its.same_weights(base), skills, heads)
        model = its.build_polyroute(case, its.same_weights(base), poly, skills, heads)
        model.train(not case.new_tokens)
        call = its.build_call(
            case, model, its.build_batch(case) | its.task_inputs(case, "polyroute")
        )
        result: Callable[[], Any] = call
        return result


def compare(case: Case, versions: Sequence[Version], seconds: float) -> np.ndarray:
    """The seconds of each call, `[pairs, versions]`."""
    base = versions[0].contenders.build_base(case)
    calls = [version.call(case, base) for version in versions]
    for call in calls * 3:
        call()
    found: list[list[float]] = []
    started = time.perf_counter()
    gc.collect()
    gc.disable()  # a collection would be charged to whoever happens to cause it
    while time.perf_counter() - started < seconds or len(found) < 10:
        pair = [0.0] * len(calls)
        order = range(len(calls)) if len(found) % 2 == 0 else reversed(range(len(calls)))
        for number in order:
            before = time.perf_counter()
            calls[number]()
            pair[number] = time.perf_counter() - before
        found.append(pair)
        if len(found) % 20 == 0:
            gc.collect()
    gc.enable()
    return np.array(found)


def interval(ratios: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the median, by bootstrap."""
    draws = np.random.default_rng(0).integers(len(ratios), size=(2000, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    return float(low), float(high)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare the chosen cases."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("other", type=Path, help="the folder src of another checkout")
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="CASE")
    parser.add_argument("--seconds", type=float, default=60, help="how long each case is timed")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    versions = [Version(options.other.resolve()), Version(HERE.parent / "src")]
    print(
        "| case | old, ms | new, ms | new / old, median | 95 % | pairs |\n|---|---|---|---|---|---|"
    )
    for name in options.cases:
        case = next(case for case in all_cases("cpu") if case.name == name)
        seconds = compare(case, versions, options.seconds)
        ratios = seconds[:, 1] / seconds[:, 0]
        low, high = interval(ratios)
        old, new = (statistics.median(column) * 1e3 for column in seconds.T)
        print(
            f"| {name} | {old:.1f} | {new:.1f} | {np.median(ratios):.3f} | {low:.3f} to {high:.3f} "
            f"| {len(ratios)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
