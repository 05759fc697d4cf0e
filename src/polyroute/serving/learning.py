"""Learning new tasks while a server answers: phase z, one task after the other, in a thread."""

import threading
import time
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from polyroute.adapt import adapt_many
from polyroute.adapting.settings import AdaptSettings
from polyroute.adapting.slot_training import SlotTraining
from polyroute.errors import InputError, reason
from polyroute.kinds.choose import ModelKind
from polyroute.model import RoutedModel
from polyroute.serving.requests import BusyError, ServingError, check_characters
from polyroute.settings import SEEDS, whole
from polyroute.study.examples import encoded_records

__all__ = ["Learner"]

MOST_WAITING = 16
MOST_KEPT = 1000
"""Jobs that are over are told of until so many others have come."""
MOST_EXAMPLES, MOST_STEPS = 1000, 1000
SETTINGS = ("steps", "batch_size", "route_lr", "seed")
"""What a client may set; other settings of an adaptation stay at their defaults."""
DEFAULTS: Mapping[str, Any] = {"steps": 16, "batch_size": 8}


@dataclass
class Job:
    """A task that is learned."""

    name: str
    examples: Sequence[Mapping[str, Any]]
    """Until the job is over."""
    count: int
    """Of the examples."""
    settings: Mapping[str, Any]
    seed: int
    status: str = "waiting"
    """`waiting`, `running`, `done` or `failed`."""
    step: int = 0
    loss: float | None = None
    seconds: float = 0.0
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "name": self.name, "status": self.status, "step": self.step,
            "steps": self.settings["steps"], "examples": self.count, "loss": self.loss,
            "seconds": round(self.seconds, 3), "error": self.error,
        }  # fmt: skip


class Learner:
    """Learns tasks from examples, on a model of its own, which shares the base model's weights.

    Args:
        model: a routed model that nothing else uses.
        kind: how its base model reads and learns.
        is_taken: whether there is a task of a name.
        keep: takes the row of a task that was learned.
    """

    def __init__(
        self,
        model: RoutedModel,
        kind: ModelKind,
        is_taken: Callable[[str], bool],
        keep: Callable[[str, Tensor], object],
    ) -> None:
        self.model, self.kind, self._is_taken, self._keep = model, kind, is_taken, keep
        self._waiting: deque[Job] = deque()
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._changed = threading.Condition()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._work, name="polyroute learn", daemon=True)

    def start(self) -> None:
        """Begin to learn what is asked for."""
        self._thread.start()

    def stop(self) -> None:
        """Give up what is being learned; nothing of it is kept."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def ask(
        self, name: str, examples: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
    ) -> Job:
        """Have a task learned.

        Raises:
            InputError: an example or a setting cannot be used, or the task is there or is being
                learned.
            BusyError: too many wait.
        """
        given = dict(settings)
        if (phase := given.pop("phase", "z")) != "z":
            raise InputError(
                f"a server learns rows, in phase 'z', not {phase!r}: use `polyroute adapt` for "
                "others"
            )
        for setting in given:
            if setting not in SETTINGS:
                raise InputError(
                    f"{setting!r} is no setting of a task that is learned: use {list(SETTINGS)}"
                )
        seed = given.pop("seed", 0)
        given = {**DEFAULTS, **given}
        AdaptSettings(phase="z", **given)
        whole(0, most=SEEDS - 1)("seed", seed)
        if given["steps"] > MOST_STEPS or len(examples) > MOST_EXAMPLES:
            raise InputError(
                f"a server takes at most {MOST_STEPS} steps and {MOST_EXAMPLES} examples: use "
                "`polyroute adapt` for more"
            )
        job = Job(name, list(examples), len(examples), given, seed)
        with self.while_idle(name):
            if self._is_taken(name):
                raise InputError(
                    f"the name {name!r} is taken: delete the task, or choose another one"
                )
            if sum(self.is_learning(other) for other in self._jobs) > MOST_WAITING:
                raise BusyError
            before = self._jobs.pop(name, None)
            self._jobs[name] = job  # from now on nobody else may write the row
        try:
            _check_examples(name, examples, self.kind)
        except BaseException:
            with self._changed:
                del self._jobs[name]
                if before is not None:
                    self._jobs[name] = before
            raise
        with self._changed:
            while len(self._jobs) > MOST_KEPT + MOST_WAITING:
                self._jobs.popitem(last=False)
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    @contextmanager
    def while_idle(self, name: str) -> Iterator[None]:
        """While the row of a task is written by others, nobody begins to learn one.

        Raises:
            InputError: the task is being learned.
        """
        with self._changed:
            if self.is_learning(name):
                raise InputError(f"task {name!r} is being learned: wait until that is over")
            yield

    def forget(self, name: str) -> None:
        """Know nothing of a task any more, unless it is being learned again."""
        with self._changed:
            if not self.is_learning(name):
                self._jobs.pop(name, None)

    def job(self, name: str) -> Job | None:
        """What is known of a task that was asked for."""
        return self._jobs.get(name)

    def is_learning(self, name: str) -> bool:
        """Whether a task waits or is being learned."""
        job = self._jobs.get(name)
        return job is not None and job.status in ("waiting", "running")

    def __len__(self) -> int:
        """The number of tasks that wait."""
        return len(self._waiting)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_stopping)
                if self._is_stopping:
                    return
                job = self._waiting.popleft()
                job.status = "running"
            started = time.perf_counter()
            try:
                self._learn(job, started)
            except _StoppedError:
                return
            except (InputError, ServingError) as error:
                job.error = str(error)
            except Exception as error:  # the tasks that wait must not suffer
                job.error = f"learning failed ({reason(error)})"
            job.seconds = time.perf_counter() - started
            job.examples = ()
            # Last, since whoever waits for it reads the rest then.
            job.status = "done" if job.error is None else "failed"

    def _learn(self, job: Job, started: float) -> None:
        def note(training: SlotTraining) -> None:
            job.step, job.loss = training.step, training.losses[-1]
            job.seconds = time.perf_counter() - started
            if self._is_stopping:
                raise _StoppedError

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (found,) = adapt_many(
                self.model, {job.name: job.examples}, kind=self.kind, phase="z", seeds=[job.seed],
                each_step=note, **job.settings,
            )  # fmt: skip
        if found.diverged_at is not None or found.route is None:
            raise InputError("training diverged: lower route_lr")
        self._keep(job.name, found.route)


class _StoppedError(Exception):
    """The server is shutting down."""


def _check_examples(name: str, examples: Sequence[Mapping[str, Any]], kind: ModelKind) -> None:
    if not examples or not all(isinstance(example, Mapping) for example in examples):
        raise InputError(
            "examples must be a list of objects with 'input' and 'target' and, optionally, "
            "'instruction' and 'choices'"
        )
    for number, example in enumerate(examples):
        for field, value in example.items():
            characters = max(map(len, _texts(value)), default=0)
            check_characters(f"{field!r} of example {number}", characters, kind.max_input)
    kind.collate(encoded_records(list(examples), name, kind, too_long="refuse"))


def _texts(value: Any) -> Iterator[str]:
    """The texts in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part)
