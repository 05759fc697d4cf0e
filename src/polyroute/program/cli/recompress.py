"""`polyroute recompress`."""

from polyroute.host.output import Result
from polyroute.program.cli.command import command
from polyroute.program.options.library import RecompressOptions

__all__ = ["recompress"]


@command(RecompressOptions)
def recompress(options: RecompressOptions) -> Result:
    """Give a LoRA a smaller rank, with the least possible error.

    The base model is not needed.

    Example: `polyroute recompress loras/sql --rank 8 --out loras/sql-8`
    """
    from polyroute.program.commands.library import recompress_lora

    return recompress_lora(options)
