"""polyroute: one inventory of LoRA skills for many tasks, mixed by a small route per task.

model = polyroute.attach(base, polyroute.MHRConfig(num_skills=8), tasks=["mnli", "snips_intent"])
with model.route(["mnli", "snips_intent"]):
    loss = model(**batch).loss
"""

from typing import TYPE_CHECKING, Any

from polyroute.build import attach, from_pretrained
from polyroute.config import MHRConfig
from polyroute.errors import InputError
from polyroute.model import RoutedModel

if TYPE_CHECKING:
    from polyroute.trainer import MultiTaskTrainer, MultiTaskTrainingArguments

__all__ = [
    "InputError",
    "MHRConfig",
    "MultiTaskTrainer",
    "MultiTaskTrainingArguments",
    "RoutedModel",
    "attach",
    "from_pretrained",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # The trainer needs transformers; the core, which most uses import, needs torch alone.
    if name in ("MultiTaskTrainer", "MultiTaskTrainingArguments"):
        from polyroute import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'polyroute' has no attribute {name!r}")
