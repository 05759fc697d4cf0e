"""Timing, counting and weighing of calls, whatever they do."""

import ctypes
import gc
import os
import select
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Call = Callable[[], Any]
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
FORK_SECONDS = 300


class Counter(TorchDispatchMode):
    """Counts dispatched aten operations that compute something, and reads of a tensor's value."""

    FREE = ("_unsafe_view", "empty", "new_empty", "detach", "lift_fresh", "_local_scalar_dense")

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.synchronisations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.split("::")[-1]
        self.synchronisations += name == "_local_scalar_dense"
        self.operations += not func.is_view and not name.startswith(self.FREE)
        return func(*args, **(kwargs or {}))


def count(call: Call, device: str) -> dict[str, int]:
    """Operations of one call, and how often the host waits for the device.

    On a CPU nothing waits; there the reads of a tensor's value are counted, each of which would.
    """
    with Counter() as counter:
        call()
    syncs = cuda_synchronisations(call) if device == "cuda" else counter.synchronisations
    return {"ops": counter.operations, "host_syncs": syncs}


def cuda_synchronisations(call: Call) -> int:
    """Every kind: reads of values, and copies from unpinned memory too."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(w.message) for w in caught)


def saved_megabytes(model: Any, inputs: Mapping[str, Any]) -> float:
    """What the graph keeps for backward, beyond the model's parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # a freed address could be given out twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    kept.clear()
    loss.backward()  # frees the graph, which the hooks would otherwise keep alive
    for parameter in model.parameters():
        parameter.grad = None
    return sum(sizes.values()) / 2**20


def peak_megabytes(call: Call, device: str) -> float | None:
    """How far memory rises during one call above the level before it; None where it is not known.

    On a GPU: what torch has allocated. On a CPU: the resident memory of a forked process, as the
    kernel keeps its highest level; the fork keeps one contender's leftovers from the next, and the
    timed process as it was.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not CLEAR_REFS.exists():
        return None
    gc.collect()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, str(resident_growth(call)).encode())
        finally:
            os._exit(0)  # whatever the parent has open, closing it is the parent's
    os.close(writing)
    with os.fdopen(reading) as pipe:
        ready, _, _ = select.select([pipe], [], [], FORK_SECONDS)
        answer = pipe.read() if ready else ""
    if not ready:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return float(answer) if answer else None


def resident_growth(call: Call) -> float:
    """In a forked process: by how many megabytes one call raises the resident memory."""
    torch.set_num_threads(1)  # the parent's other threads are not in the fork
    call()  # pages that are not copied into a fork, such as those of libraries, come in here
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the kernel, to be counted anew
    before = resident_kilobytes("VmRSS")
    CLEAR_REFS.write_text("5", encoding="ascii")  # the highest level becomes the present one
    call()
    return (resident_kilobytes("VmHWM") - before) / 2**10


def resident_kilobytes(field: str) -> int:
    """The process's resident memory now (`VmRSS`), or its highest level (`VmHWM`)."""
    lines = STATUS.read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


def interleave(
    calls: Mapping[str, Call], rounds: int, device: str, repeats: int = 1
) -> dict[str, dict[str, list[float]]]:
    """Seconds per call, wall clock and CPU time of the process, round by round.

    The order is A B C, C B A, ..., so that a change in the machine's load meets all alike.
    """
    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds: dict[str, dict[str, list[float]]] = {n: {"wall_s": [], "cpu_s": []} for n in calls}
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            for name in list(calls) if number % 2 == 0 else reversed(list(calls)):
                synchronise()
                wall, cpu = time.perf_counter(), time.process_time()
                for _ in range(repeats):
                    calls[name]()
                synchronise()
                ended, used = time.perf_counter(), time.process_time()
                seconds[name]["wall_s"].append(round((ended - wall) / repeats, 7))
                seconds[name]["cpu_s"].append(round((used - cpu) / repeats, 7))
    finally:
        gc.enable()
    return seconds


def summarise(values: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratios within a round."""
    ratios = [value / other for value, other in zip(values, reference, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": round(middle, 4), "q25": round(low, 4), "q75": round(high, 4)}
