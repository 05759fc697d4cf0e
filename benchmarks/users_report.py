"""What `users.py` found, as numbers, tables and a picture."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from torch import Tensor
from users_data import Floats, Ints

mpl.use("Agg")
from matplotlib import pyplot as plt

HALVES = ("enrolled", "probe")
"""What the two halves of a user's examples are for."""


def ranks(similarity: Floats | Tensor) -> Ints:
    """The place, from 0, of the right candidate of each probe; the right one is on the diagonal.

    Equal candidates count half as better, so that guessing gains nothing.
    """
    values = np.asarray(similarity)
    own = np.diag(values)[:, None]
    ties = (values == own).sum(1) - 1
    return np.asarray((values > own).sum(1) + ties // 2 + ties % 2, dtype=np.int64)


def wilson(share: float, n: int) -> list[float]:
    """The 95% interval of a share of n."""
    z = 1.96
    centre, spread = (
        share + z * z / (2 * n),
        z * math.sqrt(share * (1 - share) / n + z * z / 4 / n / n),
    )
    return [(centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)]


def summary(places: Ints) -> dict[str, Any]:
    """Top-1, top-10 and mean reciprocal rank."""
    n = len(places)
    result: dict[str, Any] = {"users": n, "mean_reciprocal_rank": float((1 / (places + 1)).mean())}
    for k in (1, 10):
        share = float((places < k).mean())
        result[f"top{k}"], result[f"top{k}_interval"] = share, wilson(share, n)
    return result


def chance(n: int) -> dict[str, float]:
    """The same of a guess among n."""
    reciprocal = float((1 / np.arange(1, n + 1)).mean())
    return {"top1": 1 / n, "top10": min(1.0, 10 / n), "mean_reciprocal_rank": reciprocal}


def sign_test(ours: Sequence[int], theirs: Sequence[int]) -> tuple[int, int, float]:
    """Users that only ours finds at once, that only theirs does, and the exact two-sided p."""
    pairs = [(a == 0, b == 0) for a, b in zip(ours, theirs, strict=True)]
    gained, lost = pairs.count((True, False)), pairs.count((False, True))
    n = gained + lost
    tail = sum(math.comb(n, i) for i in range(min(gained, lost) + 1)) / 2**n
    return gained, lost, min(1.0, 2 * tail)


def mean_interval(values: Sequence[float] | Floats) -> tuple[float, float]:
    """Mean and half-width of its 95% interval."""
    array = np.asarray(values, dtype=float)
    return float(array.mean()), float(1.96 * array.std(ddof=1) / math.sqrt(len(array)))


SCORES = {"top1": "top-1", "top10": "top-10", "mean_reciprocal_rank": "mean reciprocal rank"}


def in_markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    settings, training, lora = report["settings"], report["training"], report["lora"]
    shots, new = settings["shots"], settings["new_users"]
    numbers = training["routing_numbers_a_user"]
    seconds = {
        "training": training["seconds"],
        f"rows of {new:,} users, twice": sum(report["fitting"][h]["seconds"] for h in HALVES),
        f"LoRAs of {lora['lora']['users']} users, twice": lora["lora"]["seconds"],
    }
    paragraphs = [
        f"# {settings['training_users'] + new:,} synthetic users, one routing row each",
        f"{settings['training_users']:,} training users with {shots} examples each; {new:,} new "
        f"users fitted in phase z from {shots} examples, twice from different ones. MHR, "
        f"{settings['skills']} skills, {settings['heads']} heads, rank {settings['rank']}, "
        f"{settings['granularity']} routing of the decoder: {numbers:,} numbers a user. "
        f"{training['steps']:,} training steps; {settings['fit_steps']} steps of "
        f"{settings['fit_batch']} examples for a new user. Base: the demo's model "
        "of 0.8 million parameters. Settings were chosen on other users. 95% "
        "intervals in brackets or after ±.",
        f"## Who wrote this? One of {new:,} new users, from {shots} fresh examples",
        *_identification(report, numbers),
        "## What will they write?",
        *_prediction(report),
        "## Moving a row toward another archetype",
        *_steering(report["steering"]),
        f"Time: {', '.join(f'{label} {value:.0f} s' for label, value in seconds.items())}; "
        f"{report['machine']['threads']} thread(s) of a machine with other work to do.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _scores(label: str, entry: dict[str, Any]) -> list[str]:
    cells = [label]
    for key in SCORES:
        interval = entry.get(f"{key}_interval")
        cells.append(
            f"{entry[key]:.3f}" + (" [{:.3f}, {:.3f}]".format(*interval) if interval else "")
        )
    return cells


def _identification(report: dict[str, Any], numbers: int) -> list[str]:
    found, lora, settings = report["identification"], report["lora"], report["settings"]
    archetype, some = report["archetype_of_nearest"], report["lora"]["lora"]["users"]
    head = ["found by", *SCORES.values()]
    everyone = [
        _scores("nearest row", found["rows"]),
        _scores("nearest histogram of operations", found["histogram"]),
        _scores("best possible: knows the population, sees the operations", found["best possible"]),
        _scores("chance", found["chance"]),
    ]
    wide = f"{lora['lora']['trained_parameters']:,} numbers"
    subset = [
        _scores(f"nearest row, {numbers:,} numbers", lora["row"]),
        _scores(f"nearest LoRA that began at the average skill, {wide}", lora["lora"]),
        _scores(f"nearest LoRA that began at nothing, {wide}", lora["fresh lora"]),
        _scores("best possible", lora["best possible"]),
        _scores("chance", chance(some)),
    ]
    rates = ", ".join(f"{tuned['chosen']:g} ({way})" for way, tuned in report["tuning"].items())
    return [
        _table(head, everyone),
        f"Among the first {some} of them, beside LoRAs of their own from as many examples and "
        "steps. Learning rates are those that found most of "
        f"{settings['tuning_users']} training users: {rates}.",
        _table(head, subset),
        *(
            f"The row alone is right for {gained} of them, the LoRA that began at {start} alone "
            f"for {lost} (sign test, p = {p:.2g})."
            for way, start in (("lora", "the average skill"), ("fresh lora", "nothing"))
            for gained, lost, p in [sign_test(lora["row"]["ranks"], lora[way]["ranks"])]
        ),
        "The nearest other user is of the same archetype for "
        f"{archetype['share']:.3f} [{archetype['interval'][0]:.3f}, {archetype['interval'][1]:.3f}]"
        f" of the users; chance {archetype['chance']:.3f}, by the nearest histogram "
        f"{archetype['histogram']:.3f}.",
    ]


def _prediction(report: dict[str, Any]) -> list[str]:
    rows = [
        [label, "{:.3f} ± {:.3f}".format(*mean_interval(nats))]
        for label, nats in report["prediction"].items()
    ]
    return [
        "Nats for an example of the probe; lower is better. `mu` is the average of the skills; the "
        "best possible knows the population and has seen the same examples.",
        _table(["with", "nats"], rows),
    ]


def _steering(steering: dict[str, Any]) -> list[str]:
    rows = [
        [
            f"{t:g}",
            *(
                "{:.3f} ± {:.3f}".format(*mean_interval([user[i] for user in shares]))
                for shares in steering["shares"].values()
            ),
        ]
        for i, t in enumerate(steering["t"])
    ]
    return [
        f"{len(steering['user_from_toward_bystander'])} new users, each toward the mean row of "
        "another archetype, by t. Probability that the model gives to the operation that each "
        "archetype prefers, where the three prefer different ones.",
        _table(["t", "own archetype", "the one moved toward", "a bystander"], rows),
    ]


def draw(path: Path, report: dict[str, Any]) -> None:
    """Identification by rank, and choices along the way to another style."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    found = report["identification"]
    colours = {"rows": "#d8572a", "histogram": "#3b7dd8", "best possible": "#777777"}
    names = {
        "rows": "nearest row",
        "histogram": "nearest histogram",
        "best possible": "best possible",
    }
    for label, places in found["ranks"].items():
        n = len(places)
        k = np.arange(1, n + 1)
        share = np.searchsorted(np.sort(places), k, side="left") / n
        band = np.array([wilson(float(s), n) for s in share])
        left.plot(k, share, color=colours[label], label=names[label])
        left.fill_between(k, band[:, 0], band[:, 1], color=colours[label], alpha=0.15, linewidth=0)
    left.plot(k, k / n, color="black", linestyle=":", label="chance")
    left.set_xscale("log")
    left.xaxis.set_major_formatter("{x:g}")
    left.set_ylim(0, 1.02)
    left.set_xlabel(f"candidates looked at, of {n:,} new users")
    left.set_ylabel("share of users found among them")
    left.set_title("Finding a user again from fresh examples")
    left.legend(loc=(0.03, 0.1), fontsize=9)
    left.grid(alpha=0.3)
    steering = report["steering"]
    styles = {
        "from": ("own archetype", "#3b7dd8"),
        "toward": ("archetype moved toward", "#d8572a"),
        "bystander": ("a bystander archetype", "#777777"),
    }
    for label, (text, colour) in styles.items():
        points = [
            mean_interval([user[i] for user in steering["shares"][label]])
            for i in range(len(steering["t"]))
        ]
        means, halves = zip(*points, strict=True)
        right.errorbar(steering["t"], means, yerr=halves, color=colour, label=text, capsize=3)
    right.set_ylim(bottom=0)
    right.set_xlabel("how far the row is moved")
    right.set_ylabel("probability of its preferred operation")
    right.set_title("Moving a row moves the behaviour (95% intervals)")
    right.legend(fontsize=9)
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def rounded(value: Any) -> Any:
    """Four significant digits: thousands of users in a file that can be read."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, list) else value
