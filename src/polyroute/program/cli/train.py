"""`polyroute train`."""

from polyroute.host.output import Result
from polyroute.program.cli.command import command
from polyroute.program.options.train import TrainOptions

__all__ = ["train"]


@command(TrainOptions)
def train(options: TrainOptions) -> Result:
    """Train an inventory and its routing on the training tasks of a suite.

    Example: `polyroute train --model demo --data SUITE --method mhr --skills 8 --heads 16 --rank 4
    --out runs/mhr`
    """
    from polyroute.program.commands.train import train_run

    return train_run(options)
