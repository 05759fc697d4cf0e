"""`polyroute reproduce`."""

from dataclasses import replace
from typing import Any

from polyroute.host.output import Result
from polyroute.program.cli.adapt import adapt
from polyroute.program.cli.command import Command, command
from polyroute.program.cli.evaluate import evaluate
from polyroute.program.cli.train import train
from polyroute.program.options.experiments import ReproduceOptions

__all__ = ["reproduce"]


@command(ReproduceOptions)
def reproduce(options: ReproduceOptions) -> Result:
    """Run the paper's experiments: train every method, adapt it in every phase, compare.

    Everything is checked before anything is trained. Stages that are done are not done again.

    Example: `polyroute reproduce t0 --data T0 --methods mhr,poly,shared --out runs/t0`
    """
    from polyroute.program.commands.train import begin_run
    from polyroute.program.reproduce.rehearsal import BEGIN
    from polyroute.program.reproduce.run import run_preset

    begin = replace(train, work=begin_run)
    commands: dict[str, Command[Any]] = {
        "train": train,
        "adapt": adapt,
        "evaluate": evaluate,
        BEGIN: begin,
    }
    return run_preset(options, {name: own.prepare for name, own in commands.items()})
