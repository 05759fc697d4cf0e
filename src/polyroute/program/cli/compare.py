"""`polyroute compare`."""

from polyroute.host.output import Result
from polyroute.program.cli.command import command
from polyroute.program.options.library import CompareOptions

__all__ = ["compare"]


@command(CompareOptions)
def compare(options: CompareOptions) -> Result:
    """Say whether a library of LoRAs helps with a task, and more than controls do.

    A fresh LoRA and random libraries learn from the same examples.

    Example: `polyroute compare runs/library --data SUITE --tasks boolq`
    """
    from polyroute.program.commands.compare import compare_library

    return compare_library(options)
