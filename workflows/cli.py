"""The command line every stage shares.

    python workflows/<stage>.py [--config FILE] [--dry-run | --plan [--price P]] [--force] [key=value ...]
    python workflows/<stage>.py --help [key | section]

Exit status: 0 done; 1 done with failures beyond what the config allows, or stopped by an error that nobody foresaw,
whose traceback is in the file that the message names; 2 wrong config, data path or resources; 130, 143, 129 stopped by
Ctrl-C, SIGTERM, SIGHUP; 141 the reader of a pipe went away (`| head`).
"""

import argparse
import io
import os
import select
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TypeVar, cast

from stas_core import config as configs
from stas_core.config import Config
from stas_core.spelling import without_passwords
from workflows import cli_help, next_step, planned, run_log, tracking
from workflows.cluster import own_error
from workflows.forecast import Forecast, price_of
from workflows.out_folder import code_version, command_line, require_apart, require_out
from workflows.signals import Stopped, exit_in_time, stopped_by_signals

C = TypeVar("C", bound=Config)
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
"""In a checkout and in an installed wheel alike."""
INTERRUPTED, PIPE_CLOSED = 130, 141


def main(
    stage: str,
    cls: type[C],
    run: Callable[[C, bool], int],
    doc: str,
    arguments: Sequence[str] | None = None,
    *,
    plan: Callable[[C, bool], Sequence[Forecast]],
) -> None:
    """Parse the command line, run the stage with (config, force), and exit with its status.

    Args:
        stage: its name.
        cls: its settings.
        run: what it does; returns the exit status.
        doc: what its help says.
        arguments: of `stas <stage>`; None: those of `python workflows/<stage>.py`.
        plan: says what that would take, for `--plan`.
    """
    command = f"python workflows/{stage}.py" if arguments is None else f"stas {stage}"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names may have characters that the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            with stopped_by_signals():
                given = _parser(stage, command).parse_intermixed_args(arguments)
                if given.help is not None:
                    print(cli_help.key_help(cls, given.help) if given.help else cli_help.stage_help(command, cls, doc))
                    status = 0
                else:
                    status = _run(stage, cls, run, plan, given)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt as stop:
        status = stop.status if isinstance(stop, Stopped) else INTERRUPTED
        how = "interrupted" if status == INTERRUPTED else f"stopped by {stop}"
        print(f"{how}; the same command again goes on where it was", file=sys.stderr)
        if isinstance(stop, Stopped):
            exit_in_time(status)
    except Exception as error:  # noqa: BLE001 - the outermost frame: the user is told
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python's own flush at exit complains
            status = PIPE_CLOSED
        elif (known := own_error(error)) is not None:
            print(without_passwords(f"{type(known).__name__}: {known}"), file=sys.stderr)
            status = 2
        else:
            print(_report_unforeseen(stage, error), file=sys.stderr)
            status = 1
    sys.exit(status)


def _parser(stage: str, command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=command, add_help=False)
    default = CONFIGS / f"{stage}.yaml"
    parser.add_argument("--config", type=Path, default=default)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--price", type=float, metavar="P")
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--help", "-h", nargs="?", const="", metavar="KEY")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    # What argparse shows with its own errors, such as an unknown option.
    parser.usage = cli_help.USAGE.format(command=command).removeprefix("usage: ").rstrip()
    return parser


def _run(
    stage: str,
    cls: type[C],
    run: Callable[[C, bool], int],
    plan: Callable[[C, bool], Sequence[Forecast]],
    arguments: argparse.Namespace,
) -> int:
    file = _config_file(arguments.config)
    values = configs.parse_overrides(arguments.overrides, cls, configs.read_yaml(file))
    config = configs.build(cls, values)
    if arguments.dry_run:
        print(configs.describe(config), end="")
        return 0
    if (out := getattr(config, "out", None)) is not None:
        read: dict[str, str | None] = {**configs.section_files(cls, values)}
        if arguments.force:  # without it, a run's own config.resolved.yaml may repeat the run
            read["--config"] = str(file)
        require_apart(require_out(out, "/data/out"), read)
        run_log.require_place()
    code = code_version()
    print(f"{command_line()}\ncode {code['path']} at {code['commit']}", flush=True)
    with _telling_no_passwords(config), tracking.following(config, out):
        if arguments.plan:
            forecasts = list(plan(config, arguments.force))
            price = price_of(arguments.price, forecasts)
            for forecast in forecasts:
                print("\n".join(forecast.lines(price)), flush=True)
            if out is not None:
                figures = [one.foreseen(price) for one in forecasts if not one.is_nothing]  # of what is run later
                if (failure := planned.keep(stage, require_out(out, "/data/out"), config, figures)) is not None:
                    print(f"  note      {failure}")
            return 0
        with planned.followed(stage, require_out(out, "/data/out"), config) if out is not None else nullcontext():
            status = run(config, arguments.force)
    for line in next_step.lines(require_out(out, "/data/out")) if status == 0 and out is not None else ():
        print(without_passwords(line), flush=True)
    return status


class _WithoutPasswords:
    """A stream that leaves passwords out of what is written to it."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text; return its length, as streams do."""
        self._stream.write(without_passwords(text))
        return len(text)


@contextmanager
def _telling_no_passwords(config: Config) -> Iterator[None]:
    """Leave out of all that the block prints what is secret in the URIs of its settings, if there is any."""
    text = config.model_dump_json()
    if without_passwords(text) == text:
        yield
        return
    out, err = (cast(Any, _WithoutPasswords(stream)) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        yield


def _config_file(given: Path) -> Path:
    """Return the file that `--config` names: a path, or the name of one of our own, such as `demo`."""
    own = CONFIGS / f"{given}.yaml"
    return own if given.name == str(given) and not given.exists() and own.is_file() else given


def _reader_is_gone() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _report_unforeseen(stage: str, error: Exception) -> str:
    """Write the traceback to a log file; return the message that names it."""
    lines = without_passwords("".join(traceback.format_exception(error)))
    what = without_passwords(f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}")
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix=f"{stage}-", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as log:
            log.write(f"{command_line()}\n{lines}")
    except OSError:  # nowhere to write: show it instead
        return f"{lines}{stage} stopped: {what}. Nobody foresaw this; please report it with the traceback above"
    return (
        f"{stage} stopped: {what}. Nobody foresaw this; please report it with the traceback in {log.name}. The same "
        "command again goes on where it was"
    )
