"""The program `polyroute`: all of its commands, and what it ends with."""

import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer

from polyroute.errors import InputError
from polyroute.host import output
from polyroute.host.interrupts import terminable
from polyroute.host.printable import printable
from polyroute.program.cli.adapt import adapt
from polyroute.program.cli.check import check
from polyroute.program.cli.command import EXIT_CODES, Command, Stopped, common_flags
from polyroute.program.cli.compare import compare
from polyroute.program.cli.demo import demo
from polyroute.program.cli.demo_lm import demo_lm
from polyroute.program.cli.evaluate import evaluate
from polyroute.program.cli.export import export
from polyroute.program.cli.freeze import freeze
from polyroute.program.cli.import_ import import_
from polyroute.program.cli.inspect import inspect
from polyroute.program.cli.library import library
from polyroute.program.cli.merge import merge
from polyroute.program.cli.push import push
from polyroute.program.cli.rank import rank
from polyroute.program.cli.recompress import recompress
from polyroute.program.cli.report import report
from polyroute.program.cli.reproduce import reproduce
from polyroute.program.cli.serve import serve
from polyroute.program.cli.train import train

__all__ = ["COMMANDS", "app", "main"]

COMMANDS: tuple[Command[Any], ...] = (
    demo, demo_lm, train, adapt, evaluate, reproduce, export, push, import_, inspect, check, report,
    library, merge, recompress, rank, compare, freeze, serve,
)  # fmt: skip
"""In the order of the help."""
DONE, FAILED, REFUSED = 0, 1, 2
USAGE_ERROR: Any = typer.BadParameter.__base__
"""The error of click about a flag or argument that does not exist, is missing or is malformed."""

app = typer.Typer(
    help="Train one inventory of LoRA skills on many tasks, and adapt it to new ones.",
    epilog=EXIT_CODES,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.callback()(common_flags)
for each in COMMANDS:
    each.add_to(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. What ends it early is one sentence, and one of `EXIT_CODES`."""
    output.reset()
    arguments = sys.argv[1:] if arguments is None else arguments
    code, sentence = DONE, ""
    try:
        with terminable():
            code = app(args=arguments or ["--help"], standalone_mode=False) or DONE
    except BrokenPipeError:  # whoever read what we print has gone
        sys.stdout = None
        code = FAILED
    except KeyboardInterrupt as stop:  # between commands
        stopped = Stopped(stop)
        code, sentence = stopped.code, str(stopped)
    except Exception as error:
        code, sentence = _end(error)
    if sentence:
        print(printable(f"polyroute: {sentence}"), file=sys.stderr)
    if code:
        raise SystemExit(code)


def _end(error: Exception) -> tuple[int, str]:
    """The exit code and the sentence for an error."""
    if isinstance(error, USAGE_ERROR):
        context: Any = error.ctx
        command = context.command_path if context else "polyroute"
        return REFUSED, f"error: {_line(error.format_message())} (see `{command} --help`)"
    if isinstance(error, InputError):
        return REFUSED, f"error: {error}"
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename else ""
        return REFUSED, f"error: {name}{error.strerror or error}"
    if isinstance(error, Stopped):
        return error.code, str(error)
    if _is_out_of_memory(error):
        return REFUSED, (
            f"error: there is not enough memory ({_line(str(error))[:200]}): lower --batch-size or "
            "--max-input, or with adapt --memory"
        )
    if output.mode.verbose:
        traceback.print_exception(error)
    reason = _line(str(error))
    what = type(error).__name__ + (f" ({reason})" if reason else "")
    return FAILED, f"failed: {what}; --verbose shows where"


def _is_out_of_memory(error: Exception) -> bool:
    """Whether the machine or a device had too little memory."""
    # By name, so that an error before torch was imported does not import it.
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")


if __name__ == "__main__":
    main()
