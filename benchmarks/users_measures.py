"""What `users.py` measures: who wrote this, what will they write, and can a style be moved?"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import users_data as data
from torch import Tensor
from users_data import Floats, Ints
from users_report import HALVES, ranks, summary, wilson
from users_study import AVERAGE, WAYS, Study, fit, name

from polyroute.adapt import Adapted
from polyroute.demo.suite import answer
from polyroute.host.files import write_json
from polyroute.kinds.predictions import Predictions
from polyroute.layer.factors import LoRAFactors
from polyroute.model import RoutedModel

MOVES = (0.0, 0.25, 0.5, 0.75, 1.0)


def cosines(model: RoutedModel, rows: Mapping[str, Tensor], who: Ints) -> Floats:
    """Similarity of each probe to each enrolled user, `[P, C]`, by the library's own search."""
    names = [name(u) for u in who]
    average = model.routes[AVERAGE]
    model.keep_tasks([])
    model.add_tasks(names)
    for task, row in zip(names, rows["enrolled"], strict=True):
        model.routes[task] = row
    found = np.empty((len(who), len(who)))
    for i, row in enumerate(rows["probe"]):
        near = dict(model.routes.nearest(row, k=len(names)))
        found[i] = [near[task] for task in names]
    model.keep_tasks([])
    model.add_task(AVERAGE, average)
    return found


def same_archetype(study: Study, model: RoutedModel) -> dict[str, Any]:
    """How often the nearest other enrolled user is of the same archetype; `model` holds them."""
    who, archetype = study.new, study.users.archetype
    nearest = [int(model.routes.nearest(name(u), k=1)[0][0].removeprefix("user")) for u in who]
    share = float((archetype[nearest] == archetype[who]).mean())
    sizes = np.bincount(archetype[who])
    chance_ = float((sizes * (sizes - 1)).sum() / (len(who) * (len(who) - 1)))
    counts = data.counts(study.users, who, slice(0, study.settings.shots))
    shown = data.histogram_similarity(counts, counts)
    np.fill_diagonal(shown, -np.inf)
    by_counts = float((archetype[who][shown.argmax(1)] == archetype[who]).mean())
    return {
        "share": share,
        "interval": wilson(share, len(who)),
        "chance": chance_,
        "histogram": by_counts,
    }


def delta_cosines(enrolled: Sequence[Adapted], probe: Sequence[Adapted]) -> Floats:
    """Cosine `[P, C]` between whole LoRA updates B A, centred over the enrolled.

    The updates are never written out: <B A, B' A'> = sum_rs (a_r . a'_s) (b_r . b'_s).
    """
    both = [*enrolled, *probe]
    gram = torch.zeros(len(both), len(both), dtype=torch.float64)
    for site in range(len(both[0].factors)):
        pairs = [r.factors[site] for r in both]
        assert all(isinstance(f, LoRAFactors) for f in pairs)
        a = torch.stack([f.a for f in pairs]).double()  # type: ignore[attr-defined]
        b = torch.stack([f.b for f in pairs]).double()  # type: ignore[attr-defined]
        products = torch.einsum("urd,vsd->uvrs", a, a) * torch.einsum("urd,vsd->uvrs", b, b)
        gram += products.sum((-1, -2))
    n = len(enrolled)
    mean = torch.cat([torch.full((n,), 1 / n), torch.zeros(len(probe))]).double()
    centre = torch.eye(len(both), dtype=torch.float64) - mean
    gram = centre @ gram @ centre.T
    length = gram.diag().clamp_min(1e-30).sqrt()
    return np.asarray((gram / length / length[:, None])[n:, :n].numpy())


def compare_lora(
    study: Study,
    models: Mapping[str, RoutedModel],
    rates: Mapping[str, float],
    by_row: Floats,
    best: Floats,
) -> dict[str, Any]:
    """LoRAs of their own for some users, from the same examples, in both ways there are."""
    report = study.done("lora.json") or {}
    who = study.new[: study.settings.lora_users]
    for way in WAYS[1:]:
        if way in report:
            continue
        started = time.perf_counter()
        enrolled, probe = (fit(study, models[way], who, half, way, rates[way]) for half in HALVES)
        places = ranks(delta_cosines(enrolled, probe))
        report[way] = {
            **summary(places),
            "ranks": places.tolist(),
            "trained_parameters": probe[0].trained_parameters,
            "last_loss": float(np.mean([r.last_loss for r in enrolled])),
            "seconds": time.perf_counter() - started,
        }
        write_json(study.work / "lora.json", report)
    n = len(who)
    places = ranks(by_row[:n, :n])
    return {
        **report,
        "row": {**summary(places), "ranks": places.tolist()},
        "best possible": summary(ranks(best[:n, :n])),
    }


# -------------------------------------------------------------------------------- what do they do


@torch.no_grad()
def costs(study: Study, model: RoutedModel, who: Ints, half: str, route: str | None) -> Floats:
    """Nats an example, `[U]`, of what users wrote, under their own route or another's."""
    found = []
    for start in range(0, len(who), 16):
        rows = [row for u in who[start : start + 16] for row in study.rows(u, study.half(half))]
        batch = study.kind.collate(
            [row if route is None else {**row, "task": route} for row in rows]
        )
        logits = model(**batch, use_cache=False).logits
        found.append(
            -Predictions.of(logits, batch["labels"])
            .log_probs()[:, 0]
            .view(-1, study.settings.shots)
            .mean(1)
        )
    return np.asarray(torch.cat(found).double().numpy())


def predict(study: Study, model: RoutedModel) -> dict[str, Any]:
    """How well the enrolled row foretells what its user writes later; `model` holds all rows."""
    if (report := study.done("prediction.json")) is not None:
        return report
    users, who, shots = study.users, study.new, study.settings.shots
    report = {}
    for label, route in (("own row", None), ("average row", AVERAGE), ("mu", "mu")):
        report[label] = costs(study, model, who, "probe", route).tolist()
    # A row that belongs to someone else: is it the user, or is any row better than none?
    other = dict(zip(who.tolist(), np.roll(who, 1).tolist(), strict=True))
    own = {u: model.routes[name(u)] for u in who.tolist()}
    for u in who.tolist():
        model.routes[name(u)] = own[other[u]]
    report["another user's row"] = costs(study, model, who, "probe", None).tolist()
    for u in who.tolist():
        model.routes[name(u)] = own[u]
    seen = data.counts(users, who, slice(0, shots))
    later = data.counts(users, who, slice(shots, 2 * shots))
    alpha = data.prior(study.settings.population, users.preferred)
    both = np.array(
        [
            np.diag(data.best_similarity(later[i : i + 1], seen[i : i + 1], alpha))[0]
            for i in range(len(who))
        ]
    )
    report["best possible from the same 20"] = (-both / shots).tolist()
    known = np.log(np.maximum(users.probabilities[who], 1e-300))
    report["true probabilities"] = (-(later * known).sum((1, 2)) / shots).tolist()
    write_json(study.work / "prediction.json", report)
    return report


def shares(study: Study, model: RoutedModel, task: str, inputs: Ints) -> Floats:
    """Probabilities of the operations, `[D, O]`, under a route; over the 45 answers alone."""
    rows = []
    for d in range(len(data.DOMAINS)):
        for q in inputs[d]:
            words = data.words_of(d, int(q))
            answers = [answer(words, triple) for triple in data.TRIPLES]
            columns: dict[str, list[Any]] = {
                "task": [task], "instruction": [data.PROMPT], "input": [" ".join(words)],
                "target": answers[:1], "choices": [answers],
            }  # fmt: skip
            rows.append({k: v[0] for k, v in study.kind.encode(columns).items()})
    scores = torch.stack([s[:, 0] for s in study.kind.scores(model, rows)])
    joint = scores.double().softmax(-1).view(len(data.DOMAINS), -1, *data.SIZES).mean(1)
    return np.concatenate([joint.sum((2, 3)), joint.sum((1, 3)), joint.sum((1, 2))], axis=-1)


def steer(study: Study, model: RoutedModel, rows: Tensor) -> dict[str, Any]:
    """Move rows of one archetype toward the mean row of another, and watch the choices.

    For each user the target is drawn at random, and so is a bystander archetype as a control. Only
    domains and stages in which the three prefer different operations count.
    """
    if (report := study.done("steering.json")) is not None:
        return report
    settings, users = study.settings, study.users
    rng = np.random.default_rng(settings.seed)
    archetype = users.archetype[study.new]
    starts = np.array(data.STARTS)
    inputs = np.stack(
        [
            rng.choice(len(data.questions(domain)), settings.steering_inputs, replace=False)
            for domain in data.DOMAINS
        ]
    )
    model.add_task("steered", rows[0])
    found: dict[str, list[list[float]]] = {"from": [], "toward": [], "bystander": []}
    moves = []
    for i in range(settings.steered_users):
        a = int(archetype[i])
        others = [k for k in range(settings.population.archetypes) if k != a and k in archetype]
        b, c = (int(k) for k in rng.choice(others, 2, replace=False))
        preferred = users.preferred[[a, b, c]]
        told_apart = np.array(
            [[len(set(preferred[:, d, s])) == 3 for s in range(3)] for d in range(3)]
        )
        if not told_apart.any():
            continue
        goal = rows[torch.from_numpy(archetype == b)].mean(0)
        by_step = []
        for t in MOVES:
            model.routes["steered"] = torch.lerp(rows[i], goal, t)
            by_step.append(shares(study, model, "steered", inputs))
        for label, wanted in zip(found, preferred, strict=True):
            place = (wanted + starts)[..., None]
            chosen = [
                np.take_along_axis(p[:, None].repeat(3, 1), place, -1)[..., 0][told_apart].mean()
                for p in by_step
            ]
            found[label].append([float(x) for x in chosen])
        moves.append([int(study.new[i]), a, b, c])
    report = {"t": list(MOVES), "shares": found, "user_from_toward_bystander": moves}
    write_json(study.work / "steering.json", report)
    return report
