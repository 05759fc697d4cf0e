"""`polyroute merge`."""

from polyroute.host.output import Result
from polyroute.program.cli.command import command
from polyroute.program.options.library import MergeOptions

__all__ = ["merge"]


@command(MergeOptions)
def merge(options: MergeOptions) -> Result:
    """Merge LoRAs of one base model into one LoRA, exactly where that is possible.

    The base model is not needed.

    Example: `polyroute merge loras/ --method ties --rank 16 --out merged`
    """
    from polyroute.program.commands.library import merge_loras

    return merge_loras(options)
