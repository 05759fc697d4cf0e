"""`polyroute check`."""

from polyroute.host.output import Result
from polyroute.program.cli.command import command
from polyroute.program.options.finished import CheckOptions

__all__ = ["check"]


@command(CheckOptions)
def check(options: CheckOptions) -> Result:
    """Check that the files of a run are whole: inventories, checkpoints, adapters and results.

    Example: `polyroute check runs/words`
    """
    from polyroute.program.commands.check import check_run

    return check_run(options)
