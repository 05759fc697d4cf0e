"""`polyroute push`."""

from polyroute.host.output import Result
from polyroute.program.cli.command import command
from polyroute.program.options.finished import PushOptions

__all__ = ["push"]


@command(PushOptions)
def push(options: PushOptions) -> Result:
    """Send a run's inventory to the Hugging Face hub, with a model card written from the run.

    Log in with `hf auth login`, or set HF_TOKEN. A README.md in the run's folder is taken as the
    card.

    Example: `polyroute push runs/mhr user/inventory --private --license apache-2.0`
    """
    from polyroute.program.commands.push import push_run

    return push_run(options)
