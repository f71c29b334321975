"""The command `legolm`: one file a command, and here what binds them. Heavy imports are inside the commands."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import signal
import sys
import warnings
from functools import cache
from typing import Annotated

import click
import typer

from legolm.cli.ablate import ablate
from legolm.cli.bench import bench
from legolm.cli.calibrate import calibrate
from legolm.cli.certs import certs
from legolm.cli.chat import chat
from legolm.cli.client import client
from legolm.cli.compare import compare
from legolm.cli.compose import compose
from legolm.cli.devices import devices
from legolm.cli.eval import evaluate
from legolm.cli.export import export
from legolm.cli.generate import generate
from legolm.cli.importing import import_model
from legolm.cli.inspect import inspect
from legolm.cli.options import Stopped
from legolm.cli.pick import pick
from legolm.cli.prune import prune
from legolm.cli.relay import relay
from legolm.cli.report import report
from legolm.cli.run import run
from legolm.cli.serve import serve
from legolm.cli.status import status
from legolm.errors import LegolmError

app = typer.Typer(no_args_is_help=True, add_completion=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("legolm"))
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and stop")
]


@app.callback()
def main_options(version: Version = False) -> None:
    """Cut small models out of a large one, fine-tune each where its data lives, put what they learned back together."""


# In the order in which `legolm --help` lists them.
app.command()(run)
app.command()(prune)
app.command(name="import")(import_model)
app.command()(calibrate)
app.command()(inspect)
app.command(name="eval")(evaluate)
app.command()(compare)
app.command()(compose)
app.command()(export)
app.command()(chat)
app.command()(generate)
app.command()(serve)
app.command()(bench)
app.command()(pick)
app.command()(ablate)
app.command()(report)
app.command()(status)
app.command()(client)
app.command()(relay)
app.add_typer(certs, name="certs")
app.add_typer(devices, name="devices")


@cache
def _command() -> click.Command:
    """All commands as click has them: calling a Typer makes them anew, in 60 ms."""
    return typer.main.get_command(app)


STOPPED = 130
"""What a shell gives for a command that Ctrl-C ended, and Typer too."""


def main() -> None:
    """Entry point: bad input gives one line and exit code 2."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, _interrupt)
    # An interpreter that ends looks for garbage in all that torch and transformers brought: for a second.
    atexit.register(gc.freeze)
    code: object = 0
    kept = "nothing was written"
    try:
        code = _command()(standalone_mode=False)  # else it ends the process itself, without a word after Ctrl-C
    except LegolmError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        code = STOPPED
    except Stopped as stop:
        code, kept = STOPPED, str(stop)
    if code == STOPPED:
        sys.stderr.write(f"stopped: {kept}\n")
    if isinstance(code, int) and code:
        sys.exit(code)


def _interrupt(number: int, frame: object) -> None:
    """SIGTERM ends a command as Ctrl-C does: what is half done is taken away, and a line says how to go on."""
    raise KeyboardInterrupt
