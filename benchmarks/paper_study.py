"""What `paper.py` runs: inventories, few-shot adaptation and controls, on one suite.

Each stage has one file of raw results, `benchmarks/results/paper/STUDY/*.json`. If the file exists,
it is read and the stage does not run; an interrupted stage continues. Inventories stay in the work
folder.
"""

import copy
import itertools
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import polyroute as pr
from polyroute.adapt import SuiteSlots, adapt_suite
from polyroute.adapting.settings import AdaptSettings
from polyroute.build import loaded
from polyroute.data.sampling import draw_few_shot
from polyroute.data.suite import Suite
from polyroute.errors import InputError
from polyroute.host.files import make_folder, write_json
from polyroute.kinds.batches import Row
from polyroute.kinds.choose import ModelKind, kind_of
from polyroute.loading import load_base
from polyroute.program.commands.checkpoints import last_checkpoint
from polyroute.saved.checkpoint import read_checkpoint
from polyroute.saved.runs import DESCRIPTION, machine, record
from polyroute.study.alignment import alignment
from polyroute.study.alignment_callback import AlignmentCallback
from polyroute.study.base_alone import BaseAlone
from polyroute.study.evaluate import evaluate, questions, score_rows
from polyroute.study.examples import encoded, encoded_mixture
from polyroute.trainer import MultiTaskTrainer, MultiTaskTrainingArguments

KEPT = Path(__file__).parents[1] / "inventories"
"""Trained inventories in the repository."""
Result = dict[str, Any]
Prepare = Callable[["Study", pr.RoutedModel, ModelKind, int], None]
"""The last is the seed of training."""
Routes = Callable[["Study", pr.RoutedModel, ModelKind, Sequence[str]], Mapping[str, Tensor]]
"""Logits `[N, H, K]` of tasks."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How an inventory is trained; equal steps and batches for every contender."""

    steps: int
    batch_size: int
    lr: float
    route_lr: float
    weight_decay: float = 0.0
    route_weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup: float = 0.06
    phase: str = "full"


@dataclass(frozen=True, kw_only=True)
class Study:
    """A base model, a suite, and who trains, chooses and tests on which of its tasks.

    Attributes:
        train: tasks that inventories learn.
        develop: tasks on which settings are chosen; no inventory learns them.
        test: tasks on which the chosen settings are scored once.
        inventories: adapters by name, as settings of `MHRConfig`.
    """

    name: str
    base: str
    dtype: str
    max_input: int
    max_target: int
    exclude: str | None
    suite: Suite
    train: Sequence[str]
    develop: Sequence[str]
    test: Sequence[str]
    inventories: Mapping[str, Mapping[str, Any]]
    shots: int
    seeds: Sequence[int]
    work: Path
    results: Path
    max_examples: int | None = None
    """The most examples of a task that are scored; None for all."""
    text: Sequence[str] = ()
    """Held-out tasks that are answered by writing, which are scored once, apart."""
    kept: str = ""
    """The folder of `KEPT` that has inventories of this study."""

    def base_and_kind(self) -> tuple[nn.Module, ModelKind]:
        """A fresh base model without dropout, which few-shot adaptation has not either."""
        base, tokenizer = load_base(self.base, dtype=self.dtype)
        for module in base.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        kind = kind_of(base, tokenizer, max_input=self.max_input, max_target=self.max_target)
        return base, kind

    def file(self, stage: str) -> Path:
        """Where a stage's raw results are."""
        return self.results / f"{stage}.json"

    def read(self, stage: str) -> Any:
        """The raw results of a stage; None before it ran."""
        path = self.file(stage)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def write(self, stage: str, content: Any) -> None:
        """Keep the raw results of a stage."""
        make_folder(self.results)
        write_json(self.file(stage), content)

    def folder(self, inventory: str) -> Path:
        """Where an inventory lies: where it was trained here or, else, where it is kept."""
        own, kept = self.work / self.name / inventory, KEPT / self.kept / inventory
        return kept if self.kept and kept.is_dir() and not own.is_dir() else own


def train(
    study: Study,
    name: str,
    config: str,
    training: Training,
    *,
    seed: int = 0,
    start: str = "",
    alignment_steps: int | None = None,
    prepare: Prepare | None = None,
) -> None:
    """Train an inventory, from its last checkpoint if it was interrupted.

    Args:
        study: where.
        name: of the stage and of the inventory's folder.
        config: key of `study.inventories`.
        training: how.
        seed: of initialisation and of the order of examples, equal for all contenders.
        start: the name of a trained inventory to go on from; empty for a fresh one.
        alignment_steps: between measurements of gradient alignment, kept as a stage of its own.
        prepare: changes the fresh inventory, in place, before the first step.
    """
    stage = f"train-{name}"
    has_trained = study.read(stage) is not None
    folder = make_folder(study.folder(name) if has_trained else study.work / study.name / name)
    adapter = {**study.inventories[config]}
    prepared = "" if prepare is None else prepare.__name__
    how = {"training": vars(training), "seed": seed, "prepared": prepared, "dtype": study.dtype}
    # As a run of `polyroute train`, so that its commands take the inventory, and so that one that
    # was trained otherwise is not gone on with.
    read = {"model": study.base, "max_input": study.max_input, "max_target": study.max_target}
    described = {**read, "prompt": "auto", "system": None, **adapter, **how, "after": start}
    record(folder, "train", described, resume=(folder / DESCRIPTION).exists())
    if has_trained and (folder / "polyroute.json").exists():
        return
    started = time.perf_counter()
    base, kind = study.base_and_kind()
    torch.manual_seed(seed)
    last = last_checkpoint(folder)
    if start:
        model = pr.from_pretrained(base, study.folder(start))
    else:
        chosen = pr.MHRConfig(exclude_modules=study.exclude, **adapter)
        model = pr.attach(base, chosen, study.train)
        if prepare is not None and last is None:
            prepare(study, model, kind, seed)
    arguments = MultiTaskTrainingArguments(
        output_dir=str(folder),
        max_steps=training.steps,
        per_device_train_batch_size=training.batch_size,
        learning_rate=training.lr,
        route_lr=training.route_lr,
        weight_decay=training.weight_decay,
        route_weight_decay=training.route_weight_decay,
        max_grad_norm=training.max_grad_norm,
        warmup_steps=round(training.warmup * training.steps),
        phase=training.phase,
        seed=seed,
        save_steps=max(1, training.steps // 10),
        save_total_limit=1,
        logging_steps=max(1, training.steps // 30),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        log_level="warning",
    )
    rows = encoded_mixture(study.suite, study.train, "train", kind)
    trainer = MultiTaskTrainer(model, kind, arguments, rows)
    if alignment_steps:
        path = make_folder(study.results) / f"alignment-{name}.json"
        trainer.add_callback(AlignmentCallback(model, kind, rows, path, steps=alignment_steps))
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    # What was interrupted and resumed has no time.
    seconds = None if last is not None else time.perf_counter() - started
    model.save_pretrained(folder)
    log = trainer.state.log_history
    write_json(folder / "metrics.json", {"log": log, "trained_parameters": model.num_trainable()})
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    if has_trained:  # and the inventory was lost since: the same again
        return
    study.write(
        stage,
        {
            "inventory": name,
            "config": adapter,
            "start": start,
            **how,
            "tasks": len(study.train),
            "seconds": seconds,
            "parameters": model.counts(),
            "trained_parameters": model.num_trainable(),
            "log": log,
            "machine": machine(),
        },
    )


def adapt(
    study: Study,
    stage: str,
    inventory: str,
    choices: Mapping[str, AdaptSettings],
    tasks: Sequence[str],
    *,
    start: str = "",
    split: str = "test",
) -> list[Result]:
    """Adapt an inventory to tasks, with every seed, and score each result.

    Args:
        study: where.
        stage: what the file of results is called.
        inventory: a trained one.
        choices: settings by label; all of one phase.
        tasks: to adapt to.
        start: where routes start: empty for what the settings say, of which `init="usage"` is the
            mean weights of the training tasks; `z` for routes tuned first, with half of the steps.
        split: to score on.
    """
    results: list[Result] = study.read(stage) or []
    if has_all(results, tasks, choices, study.seeds):
        return results
    base, kind = study.base_and_kind()

    def note(result: Result) -> None:
        results.append({"inventory": inventory, **result})
        study.write(stage, results)

    folder = study.folder(inventory)
    with loaded(base, read_checkpoint(folder), folder) as model:
        if start == "z":
            _adapt_after_z(study, model, kind, choices, tasks, split, results, note)
            return results
        if any(chosen.init == "usage" for chosen in choices.values()):
            model.add_task("usage", init=usage(model))
        wanted = SuiteSlots(
            suite=study.suite, tasks=tasks, choices=choices, seeds=study.seeds, split=split,
            max_examples=study.max_examples, done=list(results),
        )  # fmt: skip
        adapt_suite(model, kind, wanted, note=note)
    return results


def has_all(
    results: Sequence[Result],
    tasks: Sequence[str],
    choices: Mapping[str, AdaptSettings],
    seeds: Sequence[int],
) -> bool:
    """Whether results are those of every task, choice of settings and seed.

    Raises:
        InputError: they are of others too.
    """
    found = {(r["task"], r["label"], r["seed"]) for r in results}
    wanted = set(itertools.product(tasks, choices, seeds))
    if not found <= wanted:
        raise InputError(f"results of another plan are in the way, such as {min(found - wanted)}")
    return found == wanted


def usage(model: pr.RoutedModel) -> Tensor:
    """Logits `[N, H, K]` whose weights are the mean of the training tasks' weights."""
    return mixed(model, torch.full((len(model.tasks),), 1 / len(model.tasks)))


def mixed(model: pr.RoutedModel, shares_T: Tensor) -> Tensor:
    """Logits `[N, H, K]` whose weights are those of the training tasks, each times its share."""
    weights_TNHK = torch.stack([model.weights_of(task) for task in model.tasks])
    mean_NHK = torch.einsum("t,tnhk->nhk", shares_T.to(weights_TNHK), weights_TNHK)
    # Weights are gates over their sum. The gate of a skill that is on for all tasks is 1; without
    # one, any scale that keeps gates below 1 will do.
    if model.adapter_config.shared_skill:
        return torch.logit(mean_NHK / mean_NHK[..., -1:], eps=1e-6)
    return torch.logit(mean_NHK * (0.5 / mean_NHK.amax(-1, keepdim=True)))


def _adapt_after_z(
    study: Study,
    model: pr.RoutedModel,
    kind: ModelKind,
    choices: Mapping[str, AdaptSettings],
    tasks: Sequence[str],
    split: str,
    results: list[Result],
    note: Callable[[Result], None],
) -> None:
    """Train only routes for half of the steps, then start from their mixture for the others."""
    for (label, chosen), seed in itertools.product(choices.items(), study.seeds):
        half = chosen.steps // 2
        first = replace(chosen, phase="z", steps=half, route_lr=1.0, route_weight_decay=0.0)
        routes: dict[str, Tensor] = {}

        def keep(result: Result, route: str, found: dict[str, Tensor] = routes) -> None:
            found[result["task"]] = model.routes[route].clone()

        left = [t for t in tasks if not any(r["task"] == t and r["seed"] == seed for r in results)]
        if not left:
            continue
        wanted = SuiteSlots(
            suite=study.suite, tasks=left, choices={label: first}, seeds=[seed], split=split
        )
        adapt_suite(model, kind, wanted, each=keep)
        for task, route in routes.items():
            start = f"{task} after z"
            model.add_task(start, init=route)
            second = replace(chosen, steps=chosen.steps - half, init=start)
            adapt_suite(
                model, kind, replace(wanted, tasks=[task], choices={label: second}), note=note
            )
            model.keep_tasks([name for name in model.tasks if name != start])


def zero_shot(
    study: Study,
    stage: str,
    inventory: str,
    tasks: Sequence[str],
    *,
    route: str | None = "mu",
    added: Routes | None = None,
    label: str = "",
) -> list[Result]:
    """Score an inventory on tasks, as it is.

    Args:
        study: where.
        stage: what the file of results is called.
        inventory: a trained one; `base` for the base model alone.
        tasks: to score.
        route: what all tasks are routed as, by default the average; None routes each as itself.
        added: routes of tasks that the inventory did not learn.
        label: of this choice of settings, where a stage has several.
    """
    results: list[Result] = study.read(stage) or []
    if any(result.get("label", "") == label for result in results):
        return results
    base, kind = study.base_and_kind()
    folder, model_or_base = study.folder(inventory), nullcontext(BaseAlone(base))
    if inventory != "base":
        model_or_base = loaded(base, read_checkpoint(folder), folder)
    with model_or_base as model:
        model.eval()
        for task, logits in added(study, model, kind, tasks).items() if added else ():
            model.add_task(task, init=logits)
        scores = evaluate(
            model, kind, study.suite, tasks, route=route, max_examples=study.max_examples
        )
    how = {"phase": "zero-shot", **({"label": label} if label else {})}
    results += [{"inventory": inventory, **how, **score.to_dict()} for score in scores]
    study.write(stage, results)
    return results


def align(study: Study, stage: str, inventory: str, tasks: Sequence[str], rows: int) -> None:
    """Gradient alignment between training tasks at the end of training, on `rows` examples each."""
    if study.read(stage) is not None:
        return
    base, kind = study.base_and_kind()
    examples = {
        task: list(encoded(study.suite, task, "validation", kind).select(range(rows)))
        for task in tasks
    }
    folder = study.folder(inventory)
    with loaded(base, read_checkpoint(folder), folder) as model:
        found = alignment(model, kind, examples)
    study.write(stage, {"inventory": inventory, "mean": found.mean(), **found.to_dict()})


def finetune(
    study: Study, stage: str, settings: AdaptSettings, tasks: Sequence[str]
) -> list[Result]:
    """Full fine-tuning of the base model: the same draws, batches and schedule, one by one."""
    results: list[Result] = study.read(stage) or []
    done = {(r["task"], r["seed"]) for r in results}
    base, kind = study.base_and_kind()
    base.float()
    for task in tasks:
        rows = encoded(study.suite, task, "train", kind)
        test = questions(study.suite, task, "test", kind)
        for seed in study.seeds:
            if (task, seed) in done:
                continue
            drawn = draw_few_shot(len(rows), study.shots, seed)
            started = time.perf_counter()
            model = _finetuned(copy.deepcopy(base), kind, [rows[i] for i in drawn], settings, seed)
            seconds = time.perf_counter() - started
            score, _ = score_rows(model, kind, test, route="mu")
            results.append(
                {
                    "inventory": "none", "task": task, "seed": seed, "label": "",
                    "metric": test.metric, "phase": "fine-tuning", "score": score,
                    "seconds": seconds, "shots": study.shots, "split": "test",
                    "trained_parameters": sum(p.numel() for p in base.parameters()),
                }
            )  # fmt: skip
            study.write(stage, results)
    return results


def _finetuned(
    base: nn.Module, kind: ModelKind, rows: Sequence[Row], settings: AdaptSettings, seed: int
) -> nn.Module:
    model = BaseAlone(base).eval().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), settings.lr, weight_decay=0.0)
    rising = max(1, round(settings.warmup * settings.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / rising, (settings.steps - step) / (settings.steps - rising + 1)
        ),
    )
    rng = np.random.Generator(np.random.PCG64(seed))
    queue: list[int] = []
    for _ in range(settings.steps):
        while len(queue) < settings.batch_size:
            queue.extend(rng.permutation(len(rows)).tolist())
        batch, queue = queue[: settings.batch_size], queue[settings.batch_size :]
        loss = kind.loss(model, kind.collate([{**rows[i], "task": "mu"} for i in batch]))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model
