"""`polyroute inspect`."""

from polyroute.host.output import Result
from polyroute.program.cli.command import command
from polyroute.program.options.finished import InspectOptions

__all__ = ["inspect"]


@command(InspectOptions)
def inspect(options: InspectOptions) -> Result:
    """Show what a run holds: sizes, tasks, and which skills they use.

    The base model is not needed.

    Example: `polyroute inspect runs/mhr --data SUITE`
    """
    from polyroute.program.commands.inspect import inspect_run

    return inspect_run(options)
