"""`polyroute freeze`."""

from polyroute.host.output import Result
from polyroute.program.cli.command import command
from polyroute.program.options.library import FreezeOptions

__all__ = ["freeze"]


@command(FreezeOptions)
def freeze(options: FreezeOptions) -> Result:
    """Turn a route in which tokens choose into one plain LoRA for some tasks.

    The LoRA is fitted to prompts, without answers, and its card says what it misses.

    Example: `polyroute freeze runs/library --data SUITE --tasks boolq --out frozen`
    """
    from polyroute.program.commands.freeze import freeze_route

    return freeze_route(options)
