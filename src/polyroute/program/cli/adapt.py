"""`polyroute adapt`."""

from polyroute.host.output import Result
from polyroute.program.cli.command import command
from polyroute.program.options.adapt import AdaptOptions

__all__ = ["adapt"]


@command(AdaptOptions)
def adapt(options: AdaptOptions) -> Result:
    """Adapt a trained inventory to new tasks from a few examples, and score the result.

    Without --tasks, or with `--tasks all`: all held-out tasks of the suite. All tasks, seeds and
    settings are adapted side by side, each (up to rounding) as alone. Every adapted task is also
    written as an ordinary PEFT LoRA.

    Example: `polyroute adapt runs/mhr --data SUITE --tasks boolq,conjnli --shots 32 --phase mu
    --seeds 42,1024,0`
    """
    from polyroute.program.commands.adapt import adapt_run

    return adapt_run(options)
