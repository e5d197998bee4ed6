"""``dcnr``: the table of commands. Every command imports what it needs when it runs, so that ``--help`` is instant."""

from __future__ import annotations

import io
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from dcnr.cli import (
    bench,
    chaos,
    datasets,
    demo,
    doctor,
    forward,
    layers,
    networks,
    peers,
    planning,
    sessions,
    simulate,
    training,
    watching,
)
from dcnr.cli.output import EXIT_INTERRUPTED, Debug, command

app = typer.Typer(
    name="dcnr",
    cls=layers.Root,
    help="Train and serve one model together, on machines that may fail at any moment. Start with `dcnr demo`.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"auto_envvar_prefix": layers.PREFIX, "help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"dcnr {version('dcnr')}")
        raise typer.Exit


@app.callback()
@command
def top(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option("--config", envvar="DCNR_CONFIG", metavar="FILE", help="Options as TOML, a table per command."),
    ] = None,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="DCNR_DEBUG", help="Print a traceback where a command fails.")
    ] = False,
    version: Annotated[
        bool,
        # Many a build script has a variable DCNR_VERSION that means something else.
        typer.Option(
            "--version", callback=_version, is_eager=True, allow_from_autoenv=False, help="Print the version."
        ),
    ] = False,
) -> None:
    Debug.on = debug
    layers.apply(context, config)
    Debug.on = layers.of_root(context, "debug")


app.command("demo")(demo.demo)
app.command("up")(peers.up)
app.command("orchestrator")(peers.orchestrator)
app.command("pnode")(peers.pnode)
app.add_typer(networks.app, name="network")
app.add_typer(datasets.app, name="data")
app.command("train")(training.train)
app.add_typer(sessions.app, name="session")
app.command("forward")(forward.forward)
app.command("generate")(watching.generate)
app.add_typer(watching.nodes_app, name="nodes")
app.command("plan")(planning.plan)
app.command("explain")(planning.explain)
app.command("status")(watching.status)
app.command("events")(watching.events)
app.add_typer(layers.app, name="config")
app.command("doctor")(doctor.doctor)
app.command("simulate")(simulate.simulate)
app.command("chaos")(chaos.chaos)
app.command("bench")(bench.bench)


def main() -> None:
    """The console script's entry. SIGTERM unwinds like an exit, so that temporary folders and children go too."""
    signal.signal(signal.SIGTERM, _terminated)
    # What a terminal cannot show (a file may be named in another encoding) is escaped, as on standard error.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None


def _terminated(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
