"""Kill commands at random moments, start them again, and compare what they end with.

    python scripts/kills.py --kills 10 [SCENARIO ...]

Every scenario runs once without a kill. Then it is started, killed by SIGKILL (or, every fourth
time, asked to end by SIGHUP) after a random time, and resumed until it is done. `full` has a disk
of random size in place of kills, and room after that; it has to mount a tmpfs, as root. Tensors
and results must then be those of the run without a kill, to the bit. Nothing of it is timed.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

DATA = "starter"
BASE = ["--model", "demo", "--max-input", "64", "--max-target", "16"]
TRAIN = ["train", *BASE, "--data", DATA, "--steps", "24", "--batch-size", "4", "--save-steps", "2",
         "--skills", "4", "--heads", "4", "--rank", "2"]  # fmt: skip
ADAPT = ["adapt", "RUN", "--data", DATA, "--tasks", "all", "--shots", "8", "--seeds", "0",
         "--max-test", "4", "--deterministic"]  # fmt: skip
SETTINGS = {
    "train.steps": 10, "train.bf16": False, "train.max-input": 64, "train.max-target": 8,
    "train.save-steps": 2, "adapt.steps": 4, "adapt.validation-shots": 2, "adapt.max-test": 4,
    "adapt.deterministic": True, "shots": 4, "seeds": [0], "methods.mhr.train.heads": 4,
    "methods.mhr.phases": ["z"],
}  # fmt: skip
SETS = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={json.dumps(value)}")]
SCENARIOS = {
    "train": TRAIN,
    "rowwise": [*TRAIN, "--rowwise"],
    "adapt": [*ADAPT, "--phase", "mu", "--steps", "10"],
    "waves": [*ADAPT, "--phase", "full", "--steps", "6", "--memory", "200MB"],
    "reproduce": ["reproduce", "suite", "--model", "demo", "--data", DATA, "--methods", "mhr",
                  *SETS],
    "compare": ["compare", "LIBRARY", "--data", DATA, "--tasks", "clinc_banking_intent",
                "--shots", "8", "--steps", "4", "--max-test", "8", "--randoms", "1"],
    "full": TRAIN,
}  # fmt: skip
AGAIN = "compare"
"""Is not resumed but started again, and writes one file."""
LIBRARY = ("clinc_domain", "snips_intent", "mawps_operation")
"""The tasks whose LoRAs are the library of `compare`."""
SHARES = (0.02, 1.2)
"""The size of a full disk, as a share of what a run leaves there."""


def command(parts: list[str], out: Path, place: Path, *more: str) -> list[str]:
    """A command with its folders."""
    folders = {"RUN": place / "inventory", "LIBRARY": place / "library"}
    named = [str(folders.get(part, part)) for part in parts]
    target = out / "compare.json" if parts[0] == AGAIN else out
    return [sys.executable, "-m", "polyroute", *named, "--out", str(target), "--quiet", *more]


def finish(parts: list[str], out: Path, place: Path, *more: str) -> None:
    """Run a command to its end."""
    ended = subprocess.run(
        command(parts, out, place, *more), check=False, capture_output=True, text=True
    )
    if ended.returncode:
        raise SystemExit(f"{' '.join(parts)}: status {ended.returncode}\n{ended.stderr[-2000:]}")


def content(out: Path) -> dict[str, Any]:
    """What a run ends with: all tensors by file and name, scores, and what was logged."""
    found: dict[str, Any] = {
        f"{path.relative_to(out)}:{name}": tensor
        for path in sorted(out.rglob("*.safetensors"))
        if not any(part.startswith(("checkpoint-", ".")) for part in path.relative_to(out).parts)
        for name, tensor in load_file(path).items()
    }
    found = {name: tensor.clone() for name, tensor in found.items()}  # not mapped from the disk
    for path in sorted(out.rglob("*.json")):
        if path.name == "metrics.json":
            found[str(path.relative_to(out))] = untimed(json.loads(path.read_text()))
        elif path.name == "results.json" and isinstance(
            results := json.loads(path.read_text()), list
        ):
            found[str(path.relative_to(out))] = untimed(results)
        elif path.name == "compare.json":
            found["scores"] = json.loads(path.read_text())["contenders"]
    return found


def untimed(content: Any) -> Any:
    """What a file says, without times, which differ."""
    if isinstance(content, list):
        return [untimed(entry) for entry in content]
    if not isinstance(content, dict):
        return content
    timed = ("seconds", "runtime", "per_second")
    return {key: untimed(v) for key, v in content.items() if not key.endswith(timed)}


def begun(out: Path) -> bool:
    """Whether a run is there that can be resumed."""
    return (out / "run.json").exists() and bool((out / "run.json").stat().st_size)


def check_equal(found: dict[str, Any], expected: dict[str, Any], where: tuple[str, int]) -> None:
    """Make sure that a run ends as it did without a kill."""
    assert found.keys() == expected.keys(), (where, found.keys() ^ expected.keys())
    for key, value in expected.items():
        same = torch.equal(found[key], value) if torch.is_tensor(value) else found[key] == value
        assert same, (where, key)


def killed(parts: list[str], out: Path, place: Path, seconds: float, number: int) -> int:
    """Start a command and kill it; how often it was started until it was done."""
    rng = random.Random(number)
    starts = 0
    while True:
        more = ("--resume",) if begun(out) and parts[0] != AGAIN else ()
        starts += 1
        process = subprocess.Popen(
            command(parts, out, place, *more), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
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


def filled(parts: list[str], out: Path, place: Path, number: int, usual: int) -> int:
    """Run a command on a disk that becomes full, then give it room; how often it was started."""
    size = usual * random.Random(number).uniform(*SHARES)
    out.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size:.0f}", "none", out], check=True)
    ended = subprocess.run(
        command(parts, out / "run", place), check=False, capture_output=True, text=True
    )
    lines = [line for line in ended.stderr.splitlines() if line.startswith("polyroute: ")]
    if ended.returncode:
        # A full disk is one sentence that says so.
        assert ended.returncode in (1, 2), (size, ended.returncode)
        assert lines, (size, ended.stderr[-2000:])
        assert "space" in lines[-1], (size, lines)
    subprocess.run(["mount", "-o", "remount,size=2g", out], check=True)
    if ended.returncode:
        finish(parts, out / "run", place, *(["--resume"] if begun(out / "run") else []))
    return 1 + bool(ended.returncode)


def main() -> None:
    """Kill each scenario so often; ends with an error at the first that is not as without."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenarios", nargs="*", help="all by default")
    parser.add_argument("--kills", type=int, default=10, help="of each scenario")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp())
    finish(TRAIN, place / "inventory", place)
    names = options.scenarios or list(SCENARIOS)
    if AGAIN in names:
        for task in LIBRARY:
            finish(["export", "RUN", "--task", task], place / "loras" / task, place)
        more = ["--model", "demo", "--format", "library"]
        finish(["import", str(place / "loras"), *more], place / "library", place)
    for name in names:
        parts = SCENARIOS[name]
        whole = place / f"{name}-whole"
        started = time.monotonic()
        finish(parts, whole, place)
        seconds, expected = time.monotonic() - started, content(whole)
        starts = 0
        for number in range(options.kills):
            out = place / f"{name}-{number}"
            if name == "full":
                usual = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
                try:
                    starts += filled(parts, out, place, number, usual)
                    found = content(out / "run")
                finally:
                    subprocess.run(["umount", out], check=False)
            else:
                starts += killed(parts, out, place, seconds, number)
                found = content(out)
            check_equal(found, expected, (name, number))
            shutil.rmtree(out)
        print(f"{name}: {options.kills} of {options.kills} ended as without, {starts} starts",
              flush=True)  # fmt: skip
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
