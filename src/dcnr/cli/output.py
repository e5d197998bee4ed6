"""What a command prints: tables for people, JSON for programs, and one clear line when something fails."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from dcnr.errors import DCNRError, Unreachable, UsageError

if TYPE_CHECKING:
    from rich.console import Console

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

FOLDED_MOST = 500
"""Rows of the largest table that is made as wide as the terminal."""

P = ParamSpec("P")

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
NetworkOption = Annotated[
    str | None,
    typer.Option(
        "--network",
        envvar="DCNR_NETWORK",
        metavar="ADDR",
        help="Where the network is. Default: the one that `dcnr up` runs on this machine.",
    ),
]


class Debug:
    """Whether failures print a traceback: ``--debug``, set once by the top command."""

    on = False


def out() -> Console:
    """Standard output as it is now (tests replace it)."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False, markup=False)


def say(line: str) -> None:
    """One line on standard output, unstyled, never wrapped."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def warn(line: str) -> None:
    """One line on standard error."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def print_json(value: Any) -> None:
    """One JSON document on one line: several calls make JSON lines."""
    say(json.dumps(value, ensure_ascii=False, separators=(", ", ": ")))


def print_table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """A plain table. A terminal gets one as wide as it is, whose long cells fold instead of being cut.

    What is no terminal reads lines: a row is one line there, however long. So is a table that nobody reads whole, which
    folding would take seconds for.
    """
    header = list(columns)
    cells = [[str(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty() or len(cells) > FOLDED_MOST:
        _print_lines([header, *cells])
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in header:
        table.add_column(column, overflow="fold")
    for row in cells:
        table.add_row(*row)
    out().print(table)


def _print_lines(rows: list[list[str]]) -> None:
    """Columns two blanks apart."""
    from rich.cells import cell_len

    # What would end a line (or move a terminal's cursor) is written as Python writes it.
    shown = [[cell if cell.isprintable() else repr(cell)[1:-1] for cell in row] for row in rows]
    sizes = [[len(cell) if cell.isascii() else cell_len(cell) for cell in row] for row in shown]
    widths = [max(column) for column in zip(*sizes, strict=True)]
    lines = (
        "  ".join(cell + " " * (width - size) for cell, size, width in zip(row, found, widths, strict=True)).rstrip()
        for row, found in zip(shown, sizes, strict=True)
    )
    say("\n".join(lines))


def print_fields(fields: Mapping[str, object]) -> None:
    """One thing, a line per field."""
    width = max((len(name) for name in fields), default=0)
    for name, value in fields.items():
        say(f"{name.ljust(width)}  {value}")


def next_move(error: DCNRError) -> str:
    """What to do about an error whose text does not say so itself."""
    if isinstance(error, Unreachable):
        return " (start one with `dcnr up`, or name it with --network ADDR)"
    return ""


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Turn the error tree into exit codes: 2 for wrong usage, 1 for failure, 130 for Ctrl-C."""

    @wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        from dcnr.adapters.node_packages import install

        try:
            install()
            function(*args, **kwargs)
        except DCNRError as error:
            if Debug.on:
                raise
            warn(f"error: {error}{next_move(error)}")
            raise typer.Exit(EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILURE) from error
        except BrokenPipeError as error:
            # The reader of our output (``head``, say) has seen enough; Python must not try to flush again at exit.
            sys.stdout = None
            raise typer.Exit(0) from error
        except OSError as error:
            if Debug.on:
                raise
            name = f"{error.filename}: " if error.filename else ""
            warn(f"error: {name}{error.strerror or error}")
            raise typer.Exit(EXIT_FAILURE) from error
        except KeyboardInterrupt as error:
            warn("interrupted")
            raise typer.Exit(EXIT_INTERRUPTED) from error

    return guarded


def size(count: float) -> str:
    """Bytes for people, binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def moment(unix_s: float) -> str:
    """For people: this machine's clock and time zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(unix_s))


def number(count: float) -> str:
    """A count for people, decimal units: 950, 12.3 k, 4.56 M."""
    for unit in ("", " k", " M", " G"):
        if abs(count) < 1000:
            return f"{count:.3g}{unit}" if unit else f"{count:.0f}"
        count /= 1000
    return f"{count:.3g} T"


def duration(seconds: float) -> str:
    """For people: the two largest units."""
    whole = int(seconds)
    parts = ((whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s"))
    first = next((i for i, (count, _) in enumerate(parts) if count), len(parts) - 1)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2])
