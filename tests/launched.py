"""Several processes on one machine, as `torchrun` starts them but without its import time."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from base_models import columns, llama, made, t5
from datasets import Dataset
from models import routed

from polyroute.kinds.choose import ModelKind
from polyroute.model import RoutedModel
from polyroute.trainer import MultiTaskTrainer, MultiTaskTrainingArguments

ANSWERS = ("yes", "no", "on the mat", "a big dog", "two")


def parts(
    objective: str = "lm", base: str = "t5", dtype: torch.dtype = torch.float64
) -> tuple[RoutedModel, ModelKind, Dataset]:
    """A model and 22 rows of three tasks, with targets of different lengths."""
    wrapper, kind = made({"t5": t5, "llama": llama}[base], objective=objective)
    for module in wrapper.modules():
        # Each process would drop others; T5's attention keeps a number, not a module.
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    # Where a gradient is itself rounding, AdamW makes a step of it.
    model = routed(wrapper.base_model.to(dtype), ("where", "truth", "count"), num_heads=4)
    examples = [
        (task, "", f"{task} is {i}", ANSWERS[i % 5], [ANSWERS[i % 5], ANSWERS[(i + 1) % 5]])
        for task, size in (("where", 11), ("truth", 6), ("count", 5))
        for i in range(size)
    ]
    rows = Dataset.from_dict(kind.encode(columns(*examples)), features=kind.features)
    return model, kind, rows


def trainer(folder: Path, **values: Any) -> MultiTaskTrainer:
    """On those parts, over more than one epoch, whose last batch is not full."""
    objective, base = values.pop("objective", "lm"), values.pop("base", "t5")
    model, kind, rows = parts(objective, base, values.pop("dtype", torch.float64))
    usual = {
        "max_steps": 5, "per_device_train_batch_size": 8, "report_to": [], "use_cpu": True,
        "logging_steps": 1, "weight_decay": 0.1, "adam_epsilon": 1e-3, "save_strategy": "no",
        "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    args = MultiTaskTrainingArguments(str(folder), **{**usual, **values})
    return MultiTaskTrainer(model, kind, args, rows, rows)


def train(folder: Path, resume: str | None = None, **values: Any) -> MultiTaskTrainer:
    """Train and write the inventory to `folder`."""
    made_here = trainer(folder, **values)
    made_here.train(resume_from_checkpoint=resume)
    made_here.save_model()
    return made_here


def losses(made_here: MultiTaskTrainer) -> list[float]:
    return [entry["loss"] for entry in made_here.state.log_history if "loss" in entry]


def launch(function: Callable[..., Any], *arguments: Any, processes: int = 2) -> None:
    """Call a function in several connected processes; an error in one is an error here."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["polyroute.program.commands.train", "polyroute.program.commands.adapt", "launched"]
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [
        context.Process(target=_child, args=(rank, processes, port, function, *arguments))
        for rank in range(processes)
    ]
    for child in children:
        child.start()
    running = list(children)
    while running and not any(child.exitcode for child in children):
        connection.wait([child.sentinel for child in running])
        running = [child for child in running if child.exitcode is None]
    for child in running:  # which would wait for the one that failed
        child.kill()
        child.join()
    codes = [child.exitcode for child in children]
    assert codes == [0] * processes, codes


def _child(rank: int, count: int, port: int, function: Callable[..., Any], *rest: Any) -> None:
    # What `torchrun` says; the launched processes of one machine talk over the loopback.
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    torch.set_num_threads(1)
    try:
        function(*rest)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def shard_on_cpu() -> None:
    """Let accelerate use FSDP without an accelerator, as torch can."""
    init = AcceleratorState.__init__

    def patched(self: Any, *arguments: Any, fsdp_plugin: Any = None, **rest: Any) -> None:
        init(self, *arguments, fsdp_plugin=fsdp_plugin, **rest)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = patched
