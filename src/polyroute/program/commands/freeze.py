"""`polyroute freeze`: one LoRA in place of a route."""

from typing import Any

from polyroute.data.sampling import some_places
from polyroute.errors import InputError
from polyroute.host.files import make_folder
from polyroute.host.output import Result
from polyroute.host.progress import progress
from polyroute.library.freezing import freeze
from polyroute.library.token_routes import token_route
from polyroute.model import RoutedModel
from polyroute.program.commands.opened import opened
from polyroute.program.options.library import FreezeOptions
from polyroute.routes.rule import RouteRule
from polyroute.study.examples import encoded

__all__ = ["freeze_route"]


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
            progress(batches, "freezing", unit="batch"), rank=options.rank, run=run_prompts,
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
        f"froze {options.route} on {len(rows)} prompts as a LoRA of rank {options.rank}; on "
        f"prompts that were left out it misses {frozen.error:.3f} of the norm of the live update, "
        f"as a mean over layers; it is in {options.out}"
    )
    return Result(document, (sentence,))
