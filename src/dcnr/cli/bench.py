"""``dcnr bench``: benchmarks as JSON lines, raw samples and the baseline's included."""

from __future__ import annotations

import importlib
from typing import Annotated

import typer

from dcnr.cli.output import command, print_json
from dcnr.errors import UsageError

BENCHMARKS = {
    "train": "dcnr.cli.bench_train",
    "head": "dcnr.cli.bench_head",
    "placement": "dcnr.cli.bench_placement",
    "recovery": "dcnr.cli.bench_recovery",
}
"""Each of them has a function ``measure`` that gives its lines."""


@command
def bench(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help=f"One of: {', '.join(BENCHMARKS)}.")] = "train",
    rounds: Annotated[int, typer.Option(min=1, help="How often each measurement is repeated, in turn.")] = 3,
    full: Annotated[bool, typer.Option("--full", help="recovery: ten minutes of training under kills.")] = False,
    store: Annotated[
        str | None, typer.Option(metavar="URL", help="recovery: the store that is measured, in place of a new folder.")
    ] = None,
) -> None:
    """Measure this machine; one JSON line per figure, with raw samples. Takes minutes; end other programs first."""
    if name not in BENCHMARKS:
        raise UsageError(f"unknown benchmark {name!r}: {', '.join(BENCHMARKS)}")
    options = {"full": full or None, "store": store}
    chosen = {option: value for option, value in options.items() if value is not None}
    if chosen and name != "recovery":
        raise UsageError(f"--{next(iter(chosen))} is for the benchmark recovery, found {name!r}")
    benchmark = importlib.import_module(BENCHMARKS[name])
    for figure in benchmark.measure(rounds, **chosen):
        print_json(figure)
