"""Feed readers of files with bytes that coverage guides, until one does not end in a sentence.

    python scripts/fuzz.py --seconds 600 [PARSER ...]

One process for each parser, one after the other. A case that fails is written to
`tests/fuzz/PARSER/`, whose files `tests/test_fuzz.py` runs.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"
CORPUS = TESTS / "fuzz"
PARSERS = ("inventory", "rows", "lora", "mttl", "run", "yaml", "jsonl", "tables")


def main() -> int:
    """Fuzz each parser in a process of its own; the number of those that failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parsers", nargs="*", choices=[*PARSERS, []], help="all by default")
    parser.add_argument("--seconds", type=int, default=600, help="for each parser")
    parser.add_argument("--one", choices=PARSERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        fuzz(options.one, options.seconds)
        return 0
    failed = 0
    for name in options.parsers or PARSERS:
        started = time.monotonic()
        ended = subprocess.run(
            [sys.executable, __file__, "--one", name, "--seconds", str(options.seconds)],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        executions = [line for line in ended.stderr.splitlines() if "exec/s" in line][-1:]
        print(f"{name}: status {ended.returncode}, {time.monotonic() - started:.0f} s", *executions)
        if ended.returncode:
            failed += 1
            print(ended.stdout[-3000:], ended.stderr[-6000:])
    return failed


def fuzz(name: str, seconds: int) -> None:
    """Fuzz one parser; never returns."""
    import atheris

    sys.path.insert(0, str(TESTS))
    with atheris.instrument_imports(include=["polyroute", "yaml", "json", "csv"]):
        import harnesses

    place = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)) / "case"
    harness = harnesses.HARNESSES[name]
    corpus = CORPUS / name
    corpus.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp())
    for number, seed in enumerate(harnesses.seeds(name, place)):
        (work / f"seed-{number}").write_bytes(seed)

    def once(data: bytes) -> None:
        try:
            harnesses.holds(harness, data, place)
        except Exception:
            digest = hashlib.sha256(data).hexdigest()[:12]
            (corpus / f"found-{digest}").write_bytes(data)
            raise

    atheris.Setup(
        [sys.argv[0], str(work), str(corpus), f"-max_total_time={seconds}", "-timeout=20",
         "-rss_limit_mb=6000", "-print_final_stats=1", f"-artifact_prefix={work}/"],
        once,
    )  # fmt: skip
    atheris.Fuzz()


if __name__ == "__main__":
    raise SystemExit(main())
