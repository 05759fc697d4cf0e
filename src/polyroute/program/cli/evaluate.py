"""`polyroute evaluate`."""

from polyroute.host.output import Result
from polyroute.program.cli.command import command
from polyroute.program.options.finished import EvaluateOptions

__all__ = ["evaluate"]


@command(EvaluateOptions)
def evaluate(options: EvaluateOptions) -> Result:
    """Score a run on tasks of a suite: its training tasks, or with --zero-shot the held-out ones.

    Example: `polyroute evaluate runs/mhr --data SUITE --tasks boolq --zero-shot`
    """
    from polyroute.program.commands.evaluate import evaluate_run

    return evaluate_run(options)
