"""``dcnr bench``: benchmarks as JSON lines, raw samples and the baseline's included."""

from __future__ import annotations

from typing import Annotated

import typer

from dcnr.cli.output import command, print_json
from dcnr.errors import UsageError

BENCHMARKS = ("train",)


@command
def bench(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help=f"One of: {', '.join(BENCHMARKS)}.")] = "train",
    rounds: Annotated[int, typer.Option(min=1, help="How often each measurement is repeated, in turn.")] = 3,
) -> None:
    """Measure this machine; one JSON line per figure, with raw samples. Takes minutes; end other programs first."""
    if name not in BENCHMARKS:
        raise UsageError(f"unknown benchmark {name!r}: {', '.join(BENCHMARKS)}")
    from dcnr.cli.bench_train import measure

    for figure in measure(rounds):
        print_json(figure)
