"""`polyroute rank` and `freeze`: which LoRAs of a run help, and one LoRA in place of a route."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from torch import nn

from polyroute.build import loaded
from polyroute.data.sampling import draw_few_shot, some_places
from polyroute.data.suite import Suite, held_out_tasks, validate
from polyroute.errors import InputError
from polyroute.host.files import make_folder
from polyroute.host.output import Result
from polyroute.host.progress import progress
from polyroute.kinds.choose import ModelKind
from polyroute.library.freezing import freeze
from polyroute.library.ranking import rank_skills
from polyroute.library.token_routes import token_route
from polyroute.loading import load_suite
from polyroute.model import RoutedModel
from polyroute.program.commands.runs import base_of, inventory_of
from polyroute.program.commands.tasks import chosen_tasks
from polyroute.program.options.library import FreezeOptions, RankOptions
from polyroute.program.options.shared import Source
from polyroute.routes.rule import RouteRule
from polyroute.saved.checkpoint import Checkpoint
from polyroute.saved.hub import locate
from polyroute.study.examples import encoded

__all__ = ["Opened", "freeze_route", "opened", "rank_library"]


@dataclass(frozen=True)
class Opened:
    """A run, and tasks of a suite that it is used for."""

    run: Path
    checkpoint: Checkpoint
    base: nn.Module
    kind: ModelKind
    suite: Suite
    tasks: Sequence[str]

    def attached(self) -> AbstractContextManager[RoutedModel]:
        """The inventory on its base model, within a `with` block."""
        return loaded(self.base, self.checkpoint, self.run)


def opened(run: Path, source: Source, needs: Sequence[str]) -> Opened:
    """Read a run, and choose tasks, by default those that the suite holds out.

    Args:
        run: as the user named it.
        source: the suite, and tasks of it.
        needs: the splits that every task must have.

    Raises:
        InputError: the run, the data or a task cannot be used.
    """
    place = Path(locate(run))
    checkpoint = inventory_of(place)
    suite = load_suite(source.data, source.reader)
    base, kind = base_of(place)
    none = f"{source.data} has no held-out task"
    tasks = chosen_tasks(suite, source.tasks, held_out_tasks(suite), kind, none=none)
    validate(suite, tasks, needs=needs)
    return Opened(place, checkpoint, base, kind, suite, tasks)


def rank_library(options: RankOptions) -> Result:
    """Rank the LoRAs of a run for each of some tasks.

    Raises:
        InputError: the run has no library, or the data or a task cannot be used.
    """
    given = opened(options.run, options.source, needs=["train"])
    kind, suite, tasks = given.kind, given.suite, given.tasks
    found: dict[str, dict[str, float]] = {}
    table = Table("task", "LoRA", "decrease of the loss")
    with given.attached() as model:
        for task in progress(tasks, "ranking"):
            rows = encoded(suite, task, "train", kind)
            shots = rows.select(draw_few_shot(len(rows), options.shots, options.seed))
            ranking = rank_skills(model.eval(), kind, list(shots))
            order = ranking.top(len(ranking.names), diversity=options.diversity)
            found[task] = {name: ranking.scores[name] for name in order}
            for name, score in found[task].items():
                table.add_row(escape(task), escape(name), f"{score:+.4f}")
    return Result({"run": str(options.run), "scores": found}, (table,))


def freeze_route(options: FreezeOptions) -> Result:
    """Write one LoRA in place of a route.

    Raises:
        InputError: the run, the data or a task cannot be used, or the folder cannot be written.
    """
    given = opened(options.run, options.source, needs=["train"])
    kind, suite, tasks = given.kind, given.suite, given.tasks
    if not kind.supports_generation:
        raise InputError("a route is frozen on texts, and this base model is an encoder")
    make_folder(options.out)
    each = -(-options.texts // len(tasks))
    rows: list[dict[str, Any]] = []
    for task in tasks:
        prompts = encoded(suite, task, "train", kind)
        rows += prompts.select(some_places(len(prompts), each))
    size = options.batch_size
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]

    def run_prompts(model: RoutedModel, batch: list[dict[str, Any]], rule: RouteRule) -> None:
        prompts = [{**row, "task": rule} for row in batch]
        kind.generate(model, prompts, max_new_tokens=options.tokens)

    with given.attached() as model:
        frozen = freeze(
            model.eval(), token_route(options.route, options.top_k),
            progress(batches, "freezing"), rank=options.rank, run=run_prompts,
        )  # fmt: skip
    frozen.save_peft(options.out)
    document = {
        "out": options.out,
        "route": options.route,
        "tasks": tasks,
        "rank": options.rank,
        "texts": len(rows),
        "error": frozen.error,
        "errors": frozen.errors,
    }
    sentence = (
        f"froze {options.route} on {len(rows)} prompts as a LoRA of rank {options.rank}; on others "
        f"it misses {frozen.error:.3f} of the norm of the live update, as a mean over layers; it "
        f"is in {options.out}"
    )
    return Result(document, (sentence,))
