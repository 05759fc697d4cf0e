"""`polyroute export --all`: every task of a run as a LoRA, in folders beside each other."""

from functools import partial
from pathlib import Path

from polyroute.build import loaded
from polyroute.exchange.peft_folders import (
    ADAPTERS,
    FOR_VLLM,
    check_exportable,
    is_whole,
    write_folders,
    write_lists,
)
from polyroute.host.interrupts import resumable
from polyroute.host.output import Result, say
from polyroute.host.progress import progress
from polyroute.program.commands.folder import RunFolder
from polyroute.program.commands.runs import base_of, inventory_of
from polyroute.program.options.finished import ExportOptions
from polyroute.routes.table import MU
from polyroute.saved.hub import locate
from polyroute.saved.peft_card import write_peft_card
from polyroute.saved.runs import DESCRIPTION, DIGEST, digest, held, read_run
from polyroute.task_names import folder_names

__all__ = ["export_all"]


def export_all(options: ExportOptions) -> Result:
    """Write every task of a run, and `mu`, as a PEFT adapter, and lists of them for servers.

    Each folder appears whole. An export that was interrupted has no `adapters.json`; with
    `--resume` it goes on with the tasks that have no folder.

    Raises:
        InputError: the run cannot be used, a task of it is no single adapter, or the place holds
            something else.
    """
    run = Path(locate(options.run))
    checkpoint = inventory_of(run)
    folder = RunFolder("export", options.out, options, (run,))
    folder.compare_given(options.given)
    names = folder_names([MU, *checkpoint.tasks], (DESCRIPTION, FOR_VLLM, ADAPTERS))
    base, kind = base_of(run)
    saved = checkpoint.saved_routes
    with loaded(base, checkpoint, run, None if saved is None else []) as model:
        check_exportable(model)
        checkpoint.check_rows()
        place = folder.open({**options.given.recorded, DIGEST: digest(run)}, options.given)
        card = partial(write_peft_card, prompting=kind.prompting, config=read_run(run)["config"])
        with held(place) as check, resumable(place):
            adapters = {task: place / name for task, name in names.items()}
            left = {task: path for task, path in adapters.items() if not is_whole(path)}
            if left:
                (place / ADAPTERS).unlink(missing_ok=True)
            with progress(total=len(left), what="exporting") as bar:
                for count in write_folders(model, saved, left, card):
                    check()
                    bar.update(count)
            is_lora = model.inventory.adapter == "lora"
            write_lists(place, adapters, for_vllm=is_lora)
        if not is_lora:
            say(f"servers such as vLLM take LoRAs alone, so {FOR_VLLM} is not written")
    document = {"out": place, "format": options.format, "task": None, "adapters": len(adapters)}
    return Result(document, (f"wrote {len(left)} PEFT adapters to {place}",))
