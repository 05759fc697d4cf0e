"""polyroute: one inventory of LoRA skills for many tasks, mixed by a small route per task.

model = polyroute.attach(base, polyroute.MHRConfig(num_skills=8), tasks=["mnli", "snips_intent"])
with model.route(["mnli", "snips_intent"]):
    loss = model(**batch).loss
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyroute.adapt import adapt_many
    from polyroute.adapting.settings import AdaptSettings
    from polyroute.build import attach, from_pretrained
    from polyroute.config import MHRConfig
    from polyroute.data.open import open_suite
    from polyroute.errors import InputError
    from polyroute.exchange import read_inventory
    from polyroute.judging import judge
    from polyroute.kinds.choose import kind_of
    from polyroute.library.compiling import compile_library
    from polyroute.library.delta import Delta
    from polyroute.library.freezing import freeze
    from polyroute.library.learning import learn_weights, search_weights
    from polyroute.library.library import Library
    from polyroute.library.ranking import rank_skills
    from polyroute.library.settings import JudgeSettings
    from polyroute.library.static import Static
    from polyroute.library.token_routes import LAG, Arrow, AverageActivation, SpectR
    from polyroute.loading import load_base
    from polyroute.model import RoutedModel
    from polyroute.routes.rule import RouteRule
    from polyroute.saved.checkpoint import read_checkpoint
    from polyroute.saved.rows import SavedRoutes
    from polyroute.study.evaluate import evaluate
    from polyroute.study.examples import encoded_mixture
    from polyroute.study.groups import start_in_groups
    from polyroute.trainer import MultiTaskTrainer, MultiTaskTrainingArguments, RoutedTrainer

__all__ = [
    "LAG",
    "AdaptSettings",
    "Arrow",
    "AverageActivation",
    "Delta",
    "InputError",
    "JudgeSettings",
    "Library",
    "MHRConfig",
    "MultiTaskTrainer",
    "MultiTaskTrainingArguments",
    "RouteRule",
    "RoutedModel",
    "RoutedTrainer",
    "SavedRoutes",
    "SpectR",
    "Static",
    "adapt_many",
    "attach",
    "compile_library",
    "encoded_mixture",
    "evaluate",
    "freeze",
    "from_pretrained",
    "judge",
    "kind_of",
    "learn_weights",
    "load_base",
    "open_suite",
    "rank_skills",
    "read_checkpoint",
    "read_inventory",
    "search_weights",
    "start_in_groups",
]

__version__ = "0.1.0"


PLACES = {
    "Arrow": "library.token_routes",
    "AverageActivation": "library.token_routes",
    "LAG": "library.token_routes",
    "SpectR": "library.token_routes",
    "AdaptSettings": "adapting.settings",
    "Delta": "library.delta",
    "InputError": "errors",
    "Library": "library.library",
    "MHRConfig": "config",
    "MultiTaskTrainer": "trainer",
    "MultiTaskTrainingArguments": "trainer",
    "RouteRule": "routes.rule",
    "RoutedModel": "model",
    "RoutedTrainer": "trainer",
    "SavedRoutes": "saved.rows",
    "Static": "library.static",
    "rank_skills": "library.ranking",
    "adapt_many": "adapt",
    "attach": "build",
    "compile_library": "library.compiling",
    "encoded_mixture": "study.examples",
    "evaluate": "study.evaluate",
    "freeze": "library.freezing",
    "from_pretrained": "build",
    "JudgeSettings": "library.settings",
    "judge": "judging",
    "kind_of": "kinds.choose",
    "learn_weights": "library.learning",
    "search_weights": "library.learning",
    "load_base": "loading",
    "open_suite": "data.open",
    "read_checkpoint": "saved.checkpoint",
    "read_inventory": "exchange",
    "start_in_groups": "study.groups",
}
"""The module that defines each public name."""


def __getattr__(name: str) -> Any:
    # A name is imported when it is first used: the core needs torch alone, training needs
    # transformers, and the help of the command line needs neither.
    if name in PLACES:
        return getattr(import_module(f"polyroute.{PLACES[name]}"), name)
    raise AttributeError(f"module 'polyroute' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
