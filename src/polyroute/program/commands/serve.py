"""`polyroute serve`: a run over OpenAI's HTTP interface."""

import asyncio
import ipaddress
import logging
import socket
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from polyroute.errors import InputError
from polyroute.host.interrupts import SIGNALS
from polyroute.host.output import Result, mode, say
from polyroute.kinds.choose import ModelKind
from polyroute.program.commands.runs import base_of, inventory_of
from polyroute.program.options.serve import ServeOptions
from polyroute.saved.hub import locate
from polyroute.serving.answers import Limits

if TYPE_CHECKING:
    from polyroute.serving.http.settings import HttpSettings
    from polyroute.serving.service import ModelService

__all__ = ["serve_run"]

NEEDED = ("fastapi", "uvicorn", "prometheus_client")
"""Packages of the extra `serve`."""
LENGTH = 2048
SECONDS_TO_DRAIN = 30
LOCAL = ("127.0.0.1", "localhost", "[::1]")


def serve_run(options: ServeOptions) -> Result:
    """Serve a run until Ctrl-C or SIGTERM.

    Raises:
        InputError: the extra `serve` is missing, the run cannot be served, or the port is taken.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise InputError(
            f"polyroute serve needs {', '.join(missing)}: pip install 'polyroute[serve]'"
        )
    from polyroute.serving.http.access import read_api_keys
    from polyroute.serving.http.settings import HttpSettings
    from polyroute.serving.service import ServedRun, make_service

    keys = {} if options.api_keys is None else read_api_keys(options.api_keys)
    is_local = _is_local(options.host)
    if not keys and not is_local:
        raise InputError(
            f"at {options.host} other machines can ask: give a file of keys with --api-keys, or "
            "listen at 127.0.0.1"
        )
    shown = f"[{options.host}]" if ":" in options.host else options.host
    # A page of another site can have its name lead here, but it has no key.
    hosts = tuple({*LOCAL, shown}) if is_local and not keys else ()
    settings = HttpSettings(api_keys=keys, allowed_hosts=hosts, timeout=options.timeout)
    run = Path(locate(options.run))
    inventory_of(run)
    with _listening(options.host, options.port) as door:
        base, kind = base_of(run)
        served = ServedRun(
            name=Path(options.run).resolve().name, run=run, tasks_dir=options.tasks_dir,
            limits=_limits(options, kind),
        )  # fmt: skip
        service = make_service(served, base, kind)
        port = door.getsockname()[1]
        say(f"serving {run} at http://{shown}:{port}; Ctrl-C ends")
        answered = asyncio.run(_serve(service, settings, door))
    return Result(
        {"run": run, "host": options.host, "port": port, "requests": answered},
        (f"answered {answered} requests",),
    )


async def _serve(service: "ModelService", settings: "HttpSettings", door: socket.socket) -> int:
    """Serve until a signal, and let running answers end; returns the number of requests."""
    import uvicorn

    from polyroute.serving.http.app import make_app

    _write_log()
    config = uvicorn.Config(
        make_app(service, settings), log_config=None, access_log=False, lifespan="off",
        server_header=False, timeout_graceful_shutdown=SECONDS_TO_DRAIN,
    )  # fmt: skip
    server = uvicorn.Server(config)
    # Its own handlers would raise the signal again once all is drained, as if that had failed.
    server.capture_signals = nullcontext  # type: ignore[method-assign, assignment]

    def end() -> None:
        server.force_exit = server.should_exit  # by a second signal
        server.should_exit = True

    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, end)
    try:
        await service.start()
        await server.serve(sockets=[door])
    finally:
        await asyncio.to_thread(service.stop)
    return int(server.server_state.total_requests)


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        InputError: the address is not of this machine, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        door = socket.create_server((host, port), family=family)
    except OSError as error:
        raise InputError(
            f"cannot listen at {host}, port {port} ({error.strerror or error}): choose another one "
            "with --port"
        ) from error
    # asyncio does so only where the protocol was named; without, each event of a stream waits.
    door.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return door


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _limits(options: ServeOptions, kind: ModelKind) -> Limits:
    """What the server takes.

    Raises:
        InputError: the model has fewer positions than were asked for.
    """
    most = kind.max_positions
    if options.max_length is not None and options.max_length > most:
        raise InputError(f"--max-length is {options.max_length}, and the model reads {most} tokens")
    return Limits(
        most_requests=options.max_batch + options.max_waiting,
        most_at_once=options.max_batch,
        most_tokens=options.max_length or min(LENGTH, most),
    )


def _write_log() -> None:
    """Write the server's log, JSON lines, to standard error."""
    log = logging.getLogger("polyroute.serve")
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.propagate = False
    log.setLevel(logging.WARNING if mode.quiet else logging.INFO)
