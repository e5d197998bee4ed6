"""``dcnr simulate``: the same decision code in virtual time, with faults from a seed."""

from __future__ import annotations

from typing import Annotated

import typer

from dcnr.cli.output import EXIT_FAILURE, JsonOption, command, print_json, say
from dcnr.errors import UsageError


def seed_range(text: str) -> range:
    """``A..B`` (both included) or one number. Raises :class:`UsageError`."""
    first, dots, last = text.partition("..")
    try:
        seeds = range(int(first), int(last if dots else first) + 1)
    except ValueError:
        raise UsageError(f"--seeds takes A..B or one number, found {text!r}") from None
    if not seeds or seeds.start < 0:
        raise UsageError(f"--seeds {text} holds no seed")
    return seeds


@command
def simulate(
    seeds: Annotated[str, typer.Option(help="A..B, both included, or one seed.")] = "0..19",
    jobs: Annotated[int, typer.Option(min=1, help="Processes that share the seeds.")] = 1,
    trace: Annotated[bool, typer.Option("--trace", help="Print the whole trace of every seed.")] = False,
    json: JsonOption = False,
) -> None:
    """Simulate whole networks with faults, one per seed; every invariant is checked. Exit 1 if one breaks."""
    from dcnr import sim

    failed = 0
    for result in sim.run(seed_range(seeds), jobs, trace):
        failed += not result.ok
        if json:
            fields = {"seed": result.seed, "ok": result.ok, "violation": result.violation, "stats": result.stats}
            print_json(fields | {"trace_digest": result.trace_digest})
            continue
        if trace or not result.ok:
            for line in result.trace:
                say(f"  {line}")
        say(f"seed {result.seed}: {'ok' if result.ok else 'FAILED'}  {result.summary}")
        if not result.ok:
            say(f"  replay it with: {result.replay}")
    if failed:
        raise typer.Exit(EXIT_FAILURE)
