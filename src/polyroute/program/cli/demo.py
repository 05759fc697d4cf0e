"""`polyroute demo`."""

from polyroute.host.output import Result
from polyroute.program.cli.command import command
from polyroute.program.options.experiments import DemoOptions

__all__ = ["demo"]


@command(DemoOptions)
def demo(options: DemoOptions) -> Result:
    """Compare shared, poly and mhr on a generated suite, end to end, in a few minutes.

    Needs no network and no GPU: the base model and the suite come with polyroute.

    Example: `polyroute demo --out demo-out`
    """
    from polyroute.demo.main import run_demo
    from polyroute.saved.runs import check_run

    resume, overwrite = options.resume, options.overwrite
    check_run(options.out, "demo", resume=resume, overwrite=overwrite)
    return run_demo(options.out, quick=options.quick, resume=resume, overwrite=overwrite)
