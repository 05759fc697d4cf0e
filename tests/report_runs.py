"""Folders of small runs, in the formats that the commands write, with made-up numbers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import polyroute as pr

HEADS = {"shared": None, "private": None, "poly": None, "mhr": 4}
HELD_OUT = tuple(f"new{i}" for i in range(6))


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_run(
    folder: Path,
    method: str,
    tasks: Sequence[str],
    *,
    skills: int = 4,
    seed: int = 0,
    phases: Sequence[str] = ("z", "mu"),
    shots: Sequence[int] = (8, 32),
    level: float = 0.5,
    data: str | None = None,
) -> Path:
    """A run of `polyroute train` with adaptations, a zero-shot evaluation and alignment."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed + len(method))
    config = {"model": "demo", "data": data or str(folder / "no-suite"), "method": method,
              "skills": skills, "seed": seed, "tasks": list(tasks)}  # fmt: skip
    write(folder / "run.json", {"command": "train", "config": config})
    log: list[dict[str, float]] = [
        {"step": s, "loss": 2 / (1 + s / 40) + 0.01 * seed} for s in range(10, 201, 10)
    ]
    if method in ("poly", "mhr"):  # the skills of poly stay alike
        step_of = 2000 if method == "poly" else 200
        log = [
            {**entry, "route_entropy": 0.97 - entry["step"] / 2000,
             "skill_cosine": 0.99 - entry["step"] / step_of / 2}
            for entry in log
        ]  # fmt: skip
    metrics = {"steps": 200, "trained_parameters": 5000, "train_runtime": 12.5}
    write(folder / "metrics.json", {**metrics, "log": [*log, {"train_loss": 0.6, "step": 200}]})
    save_inventory(folder, method, tasks, skills, seed)
    sizes = {"z": 64, "mu": 1000, "full": 4064}
    for phase in phases:
        for number in shots:
            results = [
                adapted(task, s, phase, number, sizes[phase], level + 0.05 * np.log2(number)
                        + 0.02 * i + 0.03 * draw.standard_normal())
                for i, task in enumerate(HELD_OUT)
                for s in (42, 0)
            ]  # fmt: skip
            place = folder / f"adapt-{phase}-{number}"
            write(place / "run.json", {"command": "adapt", "config": {"run": str(folder)}})
            write(place / "results.json", results)
    write_scores(folder / "evaluate-zero-shot-test.json", level - 0.1)
    write(folder / "alignment.json", alignment(draw, 0.2 + 0.1 * len(method)))
    return folder


def adapted(
    task: str, seed: int, phase: str, shots: int, parameters: int, score: float | None
) -> dict[str, Any]:
    return {
        "task": task, "seed": seed, "label": "", "phase": phase, "shots": shots, "split": "test",
        "metric": "accuracy", "score": score, "trained_parameters": parameters, "seconds": 1.5,
    }  # fmt: skip


def write_scores(path: Path, level: float) -> None:
    scores = [
        {"task": task, "metric": "accuracy", "score": level + 0.02 * i, "num_examples": 10}
        for i, task in enumerate(HELD_OUT)
    ]
    content = {"split": "test", "zero_shot": True, "macro_average": {"score": level}}
    write(path, {**content, "tasks": scores})


def alignment(draw: np.random.Generator, level: float) -> dict[str, Any]:
    tasks, sites = ["a", "b", "c", "d"], ["up", "down"]
    pairs = [[i, j] for i in range(4) for j in range(i + 1, 4)]

    def values() -> list[list[float | None]]:
        return np.clip(level + 0.1 * draw.standard_normal((2, 6)), -1, 1).round(4).tolist()

    measurements = [
        {"step": step, "seconds": 0.1, "effective": values(), "inventory": values(),
         "overlap": values(), "skipped": 0}
        for step in (50, 100, 150)
    ]  # fmt: skip
    measurements[0]["effective"][0][0] = None
    return {"tasks": tasks, "pairs": pairs, "sites": sites, "measurements": measurements}


def save_inventory(folder: Path, method: str, tasks: Sequence[str], skills: int, seed: int) -> None:
    torch.manual_seed(seed)
    base = nn.Sequential()
    base.add_module("up", nn.Linear(8, 16))
    base.add_module("down", nn.Linear(16, 8))
    count = None if method in ("shared", "private") else skills
    config = pr.MHRConfig(
        method=method,
        num_skills=count,
        num_heads=HEADS[method],
        rank=1,
        alpha=2.0,  # type: ignore[arg-type]
    )
    model = pr.attach(base, config, list(tasks))
    if model.routes.logits is not None:
        # Tasks in a few clusters, so that there is something to see.
        centres = 2 * torch.randn(5, model.routes.logits.shape[1])
        with torch.no_grad():
            for i, row in enumerate(model.routes.logits):
                row.copy_(centres[i % 5] + 0.8 * torch.randn_like(row))
    model.save_pretrained(folder)


def write_suite(folder: Path, categories: dict[str, str]) -> Path:
    folder.mkdir(parents=True)
    record = {"instruction": "", "input": "x", "target": "y", "choices": None, "split": "train"}
    for task in categories:
        (folder / f"{task}.jsonl").write_text(json.dumps(record) + "\n")
    roles = {
        task: {"category": category, "choices": False, "metric": "exact_match", "role": "train"}
        for task, category in categories.items()
    }
    write(folder / "roles.json", roles)
    return folder
