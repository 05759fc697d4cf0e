"""`polyroute serve`."""

from polyroute.host.output import Result
from polyroute.program.cli.command import command
from polyroute.program.options.serve import ServeOptions

__all__ = ["serve"]


@command(ServeOptions)
def serve(options: ServeOptions) -> Result:
    """Answer requests for every task of a run over OpenAI's HTTP interface.

    A task is the name of a model; `mu` is the average of the skills, and `base` the base model.
    Ctrl-C lets running answers end, for 30 seconds at most, and a second one stops at once.

    Example: `polyroute serve runs/mhr --port 8000 --tasks-dir runs/mhr-tasks`
    """
    from polyroute.program.commands.serve import serve_run

    return serve_run(options)
