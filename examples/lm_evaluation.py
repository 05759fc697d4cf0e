"""lm-evaluation-harness on a routed model, which only needs an open route.

    pip install "lm-eval[hf]"
    python examples/lm_evaluation.py --model MODEL --inventory runs/mhr --route mu

`MODEL` is the base model that the inventory was trained on, a causal or an encoder-decoder model.
The task is a task file of the harness, by default examples/lm_eval_tasks/capitals.yaml. The tasks
that come with the harness work the same way: leave out `task_manager`, and name them in `tasks`.
"""

import argparse
from pathlib import Path
from typing import Any

import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from transformers import PreTrainedTokenizerBase

import polyroute as pr
from polyroute.loading import load_base

TASK = Path(__file__).parent / "lm_eval_tasks" / "capitals.yaml"


def evaluate(
    model: pr.RoutedModel,
    tokenizer: PreTrainedTokenizerBase,
    route: str,
    task: Path = TASK,
    **options: Any,
) -> dict[str, Any]:
    """Score a routed model on a task file of the harness whose data is a file beside it.

    Args:
        model: a routed model of a causal or an encoder-decoder model.
        tokenizer: the tokenizer of the base model.
        route: the task of the inventory, or `"mu"`, that all examples are routed as.
        task: the task file.
        **options: options of `simple_evaluate`, such as `num_fewshot` or `limit`.

    Returns:
        The report of the harness: `results` and `samples` by task, and how they were made.
    """
    config = yaml.safe_load(task.read_text(encoding="utf-8"))
    files = config["dataset_kwargs"]["data_files"]
    config["dataset_kwargs"]["data_files"] = {
        split: str(task.parent / file) for split, file in files.items()
    }
    with model.route(route):
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
        own = TaskManager(include_defaults=False)  # reading all tasks of the harness takes a while
        report: dict[str, Any] = simple_evaluate(lm, tasks=[config], task_manager=own, **options)
    return report


def main() -> None:
    """Read the options, evaluate, and print the table of the harness."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="the base model: a folder or a hub id")
    parser.add_argument("--inventory", required=True, help="what `polyroute train` wrote")
    parser.add_argument("--route", default="mu", help="a task of the inventory, or mu")
    parser.add_argument("--task", type=Path, default=TASK, help="a task file of the harness")
    options = parser.parse_args()
    base, tokenizer = load_base(options.model)
    model = pr.from_pretrained(base, options.inventory)
    report = evaluate(model, tokenizer, options.route, options.task)
    print(make_table(report))


if __name__ == "__main__":
    main()
