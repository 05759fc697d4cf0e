"""polyroute: one inventory of LoRA skills for many tasks, mixed by a small route per task.

model = polyroute.attach(base, polyroute.MHRConfig(num_skills=8), tasks=["mnli", "snips_intent"])
with model.route(["mnli", "snips_intent"]):
    loss = model(**batch).loss
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from polyroute.build import attach, from_pretrained
from polyroute.config import MHRConfig
from polyroute.errors import InputError
from polyroute.model import RoutedModel
from polyroute.saved_routes import SavedRoutes

if TYPE_CHECKING:
    from polyroute.adapt import adapt_many
    from polyroute.kinds import kind_of
    from polyroute.trainer import MultiTaskTrainer, MultiTaskTrainingArguments

__all__ = [
    "InputError",
    "MHRConfig",
    "MultiTaskTrainer",
    "MultiTaskTrainingArguments",
    "RoutedModel",
    "SavedRoutes",
    "adapt_many",
    "attach",
    "from_pretrained",
    "kind_of",
]

__version__ = "0.1.0"


ABOVE_THE_CORE = {
    "MultiTaskTrainer": "trainer",
    "MultiTaskTrainingArguments": "trainer",
    "adapt_many": "adapt",
    "kind_of": "kinds",
}


def __getattr__(name: str) -> Any:
    # Training needs transformers; the core, which most uses import, needs torch alone.
    if name in ABOVE_THE_CORE:
        return getattr(import_module(f"polyroute.{ABOVE_THE_CORE[name]}"), name)
    raise AttributeError(f"module 'polyroute' has no attribute {name!r}")
