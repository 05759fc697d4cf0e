"""polyroute: one inventory of LoRA skills for many tasks, mixed by a small route per task.

model = polyroute.attach(base, polyroute.MHRConfig(num_skills=8), tasks=["mnli", "snips_intent"])
with model.route(["mnli", "snips_intent"]):
    loss = model(**batch).loss
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyroute.adapt import adapt_many
    from polyroute.build import attach, from_pretrained
    from polyroute.config import MHRConfig
    from polyroute.errors import InputError
    from polyroute.kinds.choose import kind_of
    from polyroute.model import RoutedModel
    from polyroute.saved.rows import SavedRoutes
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


PLACES = {
    "InputError": "errors",
    "MHRConfig": "config",
    "MultiTaskTrainer": "trainer",
    "MultiTaskTrainingArguments": "trainer",
    "RoutedModel": "model",
    "SavedRoutes": "saved.rows",
    "adapt_many": "adapt",
    "attach": "build",
    "from_pretrained": "build",
    "kind_of": "kinds.choose",
}


def __getattr__(name: str) -> Any:
    # What is not used is not imported: training needs transformers, the core torch alone, and the
    # command line's help neither.
    if name in PLACES:
        return getattr(import_module(f"polyroute.{PLACES[name]}"), name)
    raise AttributeError(f"module 'polyroute' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
