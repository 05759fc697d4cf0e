"""`polyroute rank`."""

from polyroute.host.output import Result
from polyroute.program.cli.command import command
from polyroute.program.options.library import RankOptions

__all__ = ["rank"]


@command(RankOptions)
def rank(options: RankOptions) -> Result:
    """Rank the LoRAs of a library by what a little of each would do for a task.

    One forward and backward on a few examples is enough for all of them.

    Example: `polyroute rank runs/library --data SUITE --tasks boolq`
    """
    from polyroute.program.commands.rank import rank_library

    return rank_library(options)
