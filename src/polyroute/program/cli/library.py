"""`polyroute library`."""

from polyroute.host.output import Result
from polyroute.program.cli.command import command
from polyroute.program.options.library import LibraryOptions

__all__ = ["library"]


@command(LibraryOptions)
def library(options: LibraryOptions) -> Result:
    """Show what LoRAs are: ranks, norms, and which other is most alike.

    The base model is not needed. What cannot be used is named with the reason.

    Example: `polyroute library loras/`
    """
    from polyroute.program.commands.library import library_table

    return library_table(options)
