"""``dcnr bench``: benchmarks as JSON lines, raw samples and the baseline's included."""

from __future__ import annotations

from typing import Annotated

import typer

from dcnr.cli.output import command
from dcnr.errors import UsageError


@command
def bench(name: Annotated[str, typer.Argument(metavar="[NAME]", help="train")] = "train") -> None:
    """Measure this machine; one JSON line per figure, with raw samples."""
    raise UsageError(f"unknown benchmark {name!r}: train")
