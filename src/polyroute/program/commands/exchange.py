"""`polyroute export` and `polyroute import`: inventories to and from other programs."""

from pathlib import Path

from polyroute.build import attach, loaded
from polyroute.exchange import check_export, read_inventory, write_inventory
from polyroute.exchange.foreign import read_names
from polyroute.host.output import Result
from polyroute.library.library import Library
from polyroute.program.commands.folder import RunFolder
from polyroute.program.commands.runs import (
    BaseModel,
    base_of,
    inventory_of,
    limits_of,
    load,
    settled,
)
from polyroute.program.options.finished import ExportOptions, ImportOptions
from polyroute.saved.hub import locate
from polyroute.saved.peft_card import write_peft_card
from polyroute.saved.prompting import NOTE
from polyroute.saved.runs import held, read_run

__all__ = ["export_run", "import_run"]


def export_run(options: ExportOptions) -> Result:
    """Write one task of a run as a PEFT adapter, or all of it for another program.

    Raises:
        InputError: the run or the task cannot be used, or the place cannot be written.
    """
    run, out, task = Path(locate(options.run)), options.out, options.task
    checkpoint = inventory_of(run)
    check_export(out, options.format, task)
    base, kind = base_of(run)
    with loaded(base, checkpoint, run) as model:
        write_inventory(model, out, options.format, task)
    if options.format != "mttl":
        write_peft_card(out, kind.prompting, read_run(run)["config"])
    what = f"the inventory as {options.format}" if task is None else f"{task!r} as a PEFT adapter"
    return Result({"out": out, "format": options.format, "task": task}, (f"wrote {what} to {out}",))


def import_run(options: ImportOptions) -> Result:
    """Make a run of an inventory that another program trained.

    Raises:
        InputError: an option, the checkpoint or the base model cannot be used.
    """
    folder = RunFolder("import", options.out, options, (options.source, options.model))
    tasks = None if options.tasks_file is None else read_names(options.tasks_file)
    reading, given = settled(options.reading, options.given)
    base, kind = load(BaseModel(options.model, reading))
    if options.format == "library":
        model = attach(base, Library.from_peft(options.source, allow_pickle=options.allow_pickle),
                       tasks)  # fmt: skip
    else:
        model = read_inventory(
            base, options.source, form=options.format, tasks=tasks,
            allow_pickle=options.allow_pickle,
        )  # fmt: skip
    config = {**given.recorded, **limits_of(reading), "method": model.adapter_config.method}
    place = folder.open(config, given, {NOTE: kind.prompting.to_dict()})
    with held(place):
        model.save_pretrained(place)
    return Result(
        {"out": place, "tasks": model.tasks, "parameters": model.counts()},
        (model.describe(), f"imported {len(model.tasks)} tasks; the inventory is in {place}"),
    )
