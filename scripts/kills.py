"""Kill commands at random moments, resume them, and compare what they end with.

    python scripts/kills.py --kills 10 [SCENARIO ...]

Every scenario runs once without a kill. Then it is started, killed by SIGKILL (or, every fourth
time, asked to end by SIGHUP) after a random time, and resumed until it is done. Its tensors must
then be those of the run without a kill, to the bit. Nothing of it is timed.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

DATA = "starter"
BASE = ["--model", "demo", "--max-input", "64", "--max-target", "16"]
TRAIN = ["train", *BASE, "--data", DATA, "--steps", "60", "--batch-size", "8", "--save-steps", "5",
         "--skills", "4", "--heads", "4", "--rank", "2"]  # fmt: skip
ADAPT = ["adapt", "RUN", "--data", DATA, "--tasks", "all", "--shots", "8", "--seeds", "0",
         "--max-test", "4", "--deterministic"]  # fmt: skip
SCENARIOS = {
    "train": TRAIN,
    "rowwise": [*TRAIN, "--rowwise"],
    "adapt": [*ADAPT, "--phase", "mu", "--steps", "30"],
    "waves": [*ADAPT, "--phase", "full", "--steps", "20", "--memory", "200MB"],
}


def command(parts: list[str], out: Path, run: Path, *more: str) -> list[str]:
    """A command with its folders."""
    named = [str(run) if part == "RUN" else part for part in parts]
    return [sys.executable, "-m", "polyroute", *named, "--out", str(out), "--quiet", *more]


def finish(parts: list[str], out: Path, run: Path, *more: str) -> None:
    """Run a command to its end."""
    ended = subprocess.run(
        command(parts, out, run, *more), check=False, capture_output=True, text=True
    )
    if ended.returncode:
        raise SystemExit(f"{' '.join(parts)}: status {ended.returncode}\n{ended.stderr[-2000:]}")


def tensors(out: Path) -> dict[str, torch.Tensor]:
    """All that a run has trained, by file and name."""
    return {
        f"{path.relative_to(out)}:{name}": tensor
        for path in sorted(out.rglob("*.safetensors"))
        if not any(part.startswith(("checkpoint-", ".")) for part in path.relative_to(out).parts)
        for name, tensor in load_file(path).items()
    }


def killed(parts: list[str], out: Path, run: Path, seconds: float, number: int) -> int:
    """Start a command and kill it; how often it was started until it was done."""
    rng = random.Random(number)
    starts = 0
    while True:
        is_new = not (out / "run.json").exists() or not (out / "run.json").stat().st_size
        more = () if is_new else ("--resume",)
        starts += 1
        process = subprocess.Popen(
            command(parts, out, run, *more), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        after = rng.uniform(0.1, seconds) if starts <= 2 else 10 * seconds + 60
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGHUP if number % 4 == 3 else signal.SIGKILL)
            process.wait()
            continue
        if process.returncode:
            said = process.stderr.read().decode()[-1000:] if process.stderr else ""
            raise SystemExit(f"{' '.join(parts)} {more}: status {process.returncode}\n{said}")
        return starts


def main() -> None:
    """Kill each scenario so often; ends with an error at the first that is not as without."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenarios", nargs="*", help="all by default")
    parser.add_argument("--kills", type=int, default=10, help="of each scenario")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp())
    run = place / "inventory"
    finish(TRAIN, run, run)
    for name in options.scenarios or SCENARIOS:
        parts = SCENARIOS[name]
        whole = place / f"{name}-whole"
        started = time.monotonic()
        finish(parts, whole, run)
        seconds, expected = time.monotonic() - started, tensors(whole)
        starts = 0
        for number in range(options.kills):
            out = place / f"{name}-{number}"
            starts += killed(parts, out, run, seconds, number)
            found = tensors(out)
            assert found.keys() == expected.keys(), (name, number, found.keys() ^ expected.keys())
            for key, tensor in expected.items():
                assert torch.equal(found[key], tensor), (name, number, key)
            shutil.rmtree(out)
        print(f"{name}: {options.kills} of {options.kills} ended as without, {starts} starts",
              flush=True)  # fmt: skip
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
