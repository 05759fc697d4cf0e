"""Commands: each takes one record of options, does its work and prints its result."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from typing import Annotated, Any, Generic, TypeVar

import typer

from polyroute.host import output
from polyroute.host.interrupts import Terminated
from polyroute.program.cli.defaults import defaults_from, places_of
from polyroute.program.cli.parameters import parameter_of
from polyroute.program.options.flags import Flag, flags_of, made
from polyroute.program.options.shared import Given, Options

__all__ = ["EXIT_CODES", "Command", "Stopped", "command", "common_flags"]

INTERRUPTED, BY_SIGNAL = 130, 128
EXIT_CODES = """Exit codes: 0 done; 1 it failed; 2 something given cannot be used, as one sentence
on standard error says; 130 ended by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP."""

O = TypeVar("O", bound=Options)  # noqa: E741 - options


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """A command was interrupted; unlike `KeyboardInterrupt` it passes through typer as it is."""

    def __init__(self, stop: KeyboardInterrupt) -> None:
        super().__init__("; ".join(["interrupted", *map(str, stop.args)]))
        self.code = BY_SIGNAL + stop.number if isinstance(stop, Terminated) else INTERRUPTED


@dataclass(frozen=True)
class Command(Generic[O]):
    """A command of the program.

    Args:
        name: what a user types.
        options: the class of its options, from which its flags are made.
        work: what it does; its docstring is the help.
    """

    name: str
    options: type[O]
    work: Callable[[O], output.Result]

    @property
    def flags(self) -> list[Flag]:
        """The flags of the command."""
        return flags_of(self.options)

    def add_to(self, app: typer.Typer) -> None:
        """Add the command to an app of typer."""

        def run(context: typer.Context, **_: Any) -> None:
            self._run(lambda: self.read(context))

        switches = inspect.signature(common_flags).parameters.values()
        context = inspect.Parameter(
            "context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
        )
        parameters = [context, *(parameter_of(flag) for flag in self.flags), *switches]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__doc__ = self.work.__doc__
        app.command(self.name, epilog=EXIT_CODES)(run)

    def read(self, context: typer.Context) -> O:
        """The options of a command line, checked.

        Raises:
            InputError: a value cannot be used, or values exclude each other.
        """
        values = {flag.name: flag.read(context.params[flag.name]) for flag in self.flags}
        kept = [flag for flag in self.flags if flag.marks.get("recorded", True)]
        given = Given(
            recorded={flag.name: flag.recorded(values[flag.name]) for flag in kept},
            defaults={
                flag.name: flag.recorded(flag.read(flag.typed_default))
                for flag in kept
                if flag.default is not MISSING
            },
            places=places_of(context),
        )
        return made(self.options, values, given=given)

    def prepare(self, values: Mapping[str, Any]) -> Callable[[], None]:
        """Check options as a file would give them; what is returned runs the command.

        Raises:
            InputError: one does not exist or cannot be used.
        """
        app = typer.Typer(add_completion=False)
        self.add_to(app)
        parsed: Any = typer.main.get_command(app)
        defaults = defaults_from(parsed, values, f"option {{!r}} of polyroute {self.name}")
        context = parsed.make_context(self.name, [], default_map=defaults)
        options = self.read(context)

        def run() -> None:
            with context:
                self._run(lambda: options)

        return run

    def _run(self, read: Callable[[], O]) -> None:
        try:
            with output.running():
                result = self.work(read())
        except KeyboardInterrupt as stop:
            if output.mode.depth:
                raise
            raise Stopped(stop) from None
        output.show(result)


def command(
    options: type[O], name: str | None = None
) -> Callable[[Callable[[O], output.Result]], Command[O]]:
    """Make a function a command with these options, by default of the same name."""
    return lambda work: Command(name or work.__name__, options, work)


# ------------------------------------------------------------------ what every command has


def _switch(name: str) -> Callable[[bool], None]:
    """The callback of a flag that changes the mode of the command."""

    def switch(is_on: bool) -> None:
        if is_on:
            setattr(output.mode, name.replace("-", "_"), True)

    return switch


def _everywhere(name: str, *more: str, help: str, panel: str = "Output") -> Any:
    return typer.Option(
        f"--{name}", *more, is_eager=True, expose_value=False, callback=_switch(name), help=help,
        rich_help_panel=panel,
    )  # fmt: skip


Json = Annotated[
    bool, _everywhere("json", help="Print the result as one JSON document; see docs/cli.md.")
]
Quiet = Annotated[bool, _everywhere("quiet", "-q", help="Print results alone.")]
Verbose = Annotated[
    bool,
    _everywhere("verbose", "-v", help="Print what libraries say, and where a failure happened."),
]


Trust = Annotated[
    bool,
    _everywhere(
        "trust-remote-code",
        help="Run code that comes with a base model. No file can ask for this.",
        panel="Base model",
    ),
]


def common_flags(
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    trust_remote_code: Trust = False,
) -> None:
    """Flags that every command has; they stand before its name or after it."""
