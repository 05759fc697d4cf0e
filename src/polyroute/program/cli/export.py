"""`polyroute export`."""

from polyroute.host.output import Result
from polyroute.program.cli.command import command
from polyroute.program.options.finished import ExportOptions

__all__ = ["export"]


@command(ExportOptions)
def export(options: ExportOptions) -> Result:
    """Write tasks as ordinary PEFT LoRAs, equal in function, or all for another program.

    Examples: `polyroute export runs/mhr --task mnli --out out/mnli`,
    `polyroute export runs/mhr --all --out loras`
    """
    from polyroute.program.commands.exchange import export_run
    from polyroute.program.commands.export_all import export_all

    return export_all(options) if options.all_tasks else export_run(options)
