"""`polyroute export`."""

from polyroute.host.output import Result
from polyroute.program.cli.command import command
from polyroute.program.options.finished import ExportOptions

__all__ = ["export"]


@command(ExportOptions)
def export(options: ExportOptions) -> Result:
    """Write one task as an ordinary PEFT LoRA, equal in function, or all for another program.

    Example: `polyroute export runs/mhr --task mnli --out out/mnli`
    """
    from polyroute.program.commands.exchange import export_run

    return export_run(options)
