"""`polyroute import`."""

from polyroute.host.output import Result
from polyroute.program.cli.command import command
from polyroute.program.options.finished import ImportOptions

__all__ = ["import_"]


@command(ImportOptions, "import")
def import_(options: ImportOptions) -> Result:
    """Make a run of an inventory that another program trained; the other commands then take it.

    Example: `polyroute import mhr.ckpt --model google/t5-xl-lm-adapt --out runs/mhr --allow-pickle`
    """
    from polyroute.program.commands.exchange import import_run

    return import_run(options)
