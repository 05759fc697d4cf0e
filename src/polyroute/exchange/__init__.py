"""Reading inventories of other programs, and writing inventories for them, by name of format."""

import os
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from polyroute.errors import InputError, did_you_mean
from polyroute.exchange.lora import from_lora
from polyroute.exchange.mttl import HYPER_PARAMETERS, Layout, from_mttl
from polyroute.exchange.mttl_export import write_mttl
from polyroute.exchange.peft_folder import adapters_inside, peft_type_of
from polyroute.exchange.peft_mhr import from_peft_mhr, write_peft_mhr
from polyroute.exchange.peft_poly import from_peft_poly, write_peft_poly
from polyroute.host.files import check_place
from polyroute.host.paths import expanded
from polyroute.model import RoutedModel
from polyroute.saved.peft_export import CONFIG

__all__ = ["check_export", "read_inventory", "write_inventory"]

PEFT_READERS = {"peft": from_lora, "peft-mhr": from_peft_mhr, "peft-poly": from_peft_poly}
READ = ("mttl", "mttl-main", *PEFT_READERS)
WRITTEN = ("peft", "mttl", "peft-mhr", "peft-poly")


def read_inventory(
    base_model: nn.Module,
    path: str | os.PathLike[str],
    *,
    form: str | None = None,
    tasks: Sequence[str] | None = None,
    allow_pickle: bool = False,
) -> RoutedModel:
    """Attach an inventory that another program wrote to its base model.

    Args:
        base_model: the model that the inventory was trained on.
        path: a file or a folder.
        form: the format: `"mttl"`, `"mttl-main"`, `"peft"` (one LoRA), `"peft-mhr"` or
            `"peft-poly"`; None to tell it from the files.
        tasks: the names of the routing rows, in their order; None for the names in the files, or
            numbers if there are none.
        allow_pickle: see `polyroute.exchange.foreign.read_pickle`.

    Raises:
        InputError: there is no such format, or the files cannot be read in it.
    """
    if form is not None and form not in READ:
        raise InputError(f"no format {form!r} can be imported: {did_you_mean(form, READ)}")
    place = expanded(path)
    if not place.exists():
        raise InputError(f"{place} does not exist; name a checkpoint to import")
    if form is None and (peft_type := peft_type_of(place)) is not None:
        form = {"MHR": "peft-mhr", "POLY": "peft-poly"}.get(peft_type, "peft")
    if form in PEFT_READERS:
        read = PEFT_READERS[form]
        return read(base_model, place, tasks=tasks, allow_pickle=allow_pickle)
    if form is None and not (place / HYPER_PARAMETERS).is_file():
        inside = adapters_inside(place)
        if inside:
            raise InputError(f"{place} is no checkpoint: {inside}")
    layout: Layout | None = "mttl-main" if form == "mttl-main" else "mttl" if form else None
    return from_mttl(base_model, place, tasks=tasks, layout=layout, allow_pickle=allow_pickle)


def check_export(out: Path, form: str, task: str | None) -> None:
    """Check, before a base model is loaded, that an export can be written.

    Raises:
        InputError: there is no such format, a task is missing or given in vain, or the place to
            write to holds something else.
    """
    if form not in WRITTEN:
        raise InputError(f"no format {form!r} can be written: {did_you_mean(form, WRITTEN)}")
    if form == "peft" and task is None:
        raise InputError(
            "--format peft writes a task as a LoRA; name it with --task, or take --all"
        )
    if form != "peft" and task is not None:
        raise InputError(f"--format {form} writes all tasks; leave --task out")
    if form == "mttl" and out.suffix == ".ckpt":
        check_place(out.parent)
        if out.exists():
            raise InputError(f"{out} is there already; name another --out file")
        return
    check_place(out)
    marker = HYPER_PARAMETERS if form == "mttl" else CONFIG
    if out.is_dir() and any(out.iterdir()) and not (out / marker).is_file():
        what = "checkpoint of mttl" if form == "mttl" else "adapter"
        raise InputError(f"{out} is not empty and holds no {what}; name another --out folder")


def write_inventory(
    model: RoutedModel,
    out: Path,
    form: str,
    task: str | None,
) -> None:
    """Write a task or a whole inventory, after `check_export` has passed.

    Args:
        model: has the inventory.
        out: the file or folder to write to.
        form: the format.
        task: the task to write; None for all.

    Raises:
        InputError: the format cannot hold the inventory or the task.
    """
    if form == "mttl":
        write_mttl(model, out)
    elif form == "peft-mhr":
        write_peft_mhr(model, out)
    elif form == "peft-poly":
        write_peft_poly(model, out)
    else:
        assert task is not None
        model.export_peft(task, out)
