"""Step times of this version relative to another one, interleaved: did a change cost anything?

    python benchmarks/against.py OTHER_SRC [--cases NAME ...] [--rounds 15] [--threads 2]

OTHER_SRC is the folder `src` of another checkout. Each version runs in a process of its own, with
the same base model, skills, routes and batch; both take turns, in the order A B, B A, ..., and only
one computes at a time. Printed are medians and quartiles of the ratio within a round.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CASES = (
    "t5-b16-u1", "t5-b16-u16", "llama-b16-u1", "llama-b16-u4", "llama-b16-u16", "t5-d64-b4-u4",
    "llama-d64-b4-u4", "t5-generate-b8-u4", "llama-generate-b8-u4",
)  # fmt: skip


class Version:
    """One version in a process of its own, which waits until it is told to run."""

    def __init__(self, source: Path, case: str, threads: int) -> None:
        command = [sys.executable, __file__, "--worker", case, "--threads", str(threads)]
        environment = {**os.environ, "PYTHONPATH": str(source)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        found = self._read()
        assert Path(found).is_relative_to(source), f"{found} is not in {source}"

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with code {self.process.wait()}")
        return json.loads(line)

    def seconds(self) -> float:
        """Run once."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        """Let the process end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def work(name: str, threads: int) -> None:
    """In a worker: prepare a case, then run it once for every line of standard input."""
    import time
    import warnings

    import torch
    from cases import all_cases
    from contenders import (
        build_base,
        build_batch,
        build_call,
        build_poly,
        build_polyroute,
        same_weights,
        task_inputs,
    )
    from torch import nn

    import polyroute

    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    case = next(case for case in all_cases("cpu") if case.name == name)
    base = build_base(case)
    skills, heads = case.settings[0]
    poly = build_poly(case, same_weights(base), skills, heads)
    model = build_polyroute(case, same_weights(base), poly, skills, heads)
    del poly
    model.train(not case.new_tokens)
    call = build_call(case, model, build_batch(case) | task_inputs(case, "polyroute"))
    assert isinstance(model, nn.Module)
    for _ in range(3):
        call()
    print(json.dumps(str(polyroute.__file__)), flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        for _ in range(case.calls):
            call()
        print(json.dumps((time.perf_counter() - started) / case.calls), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare the chosen cases."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("other", nargs="?", type=Path, help="the folder src of another checkout")
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="CASE")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        work(options.worker, options.threads)
        return
    if options.other is None:
        parser.error("name the folder src of another checkout")
    from measure import summarise

    sources = {"new": HERE.parent / "src", "old": options.other.resolve()}
    print("| case | old, ms | new, ms | new / old, median | quartiles |\n|---|---|---|---|---|")
    for case in options.cases:
        versions = {n: Version(source, case, options.threads) for n, source in sources.items()}
        seconds: dict[str, list[float]] = {name: [] for name in versions}
        for number in range(options.rounds):
            for name in list(versions) if number % 2 == 0 else reversed(list(versions)):
                seconds[name].append(versions[name].seconds())
        for version in versions.values():
            version.close()
        ratio = summarise(seconds["new"], seconds["old"])
        old, new = (sorted(seconds[name])[options.rounds // 2] * 1e3 for name in ("old", "new"))
        print(
            f"| {case} | {old:.1f} | {new:.1f} | {ratio['median']:.3f} | "
            f"{ratio['q25']:.3f} to {ratio['q75']:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
