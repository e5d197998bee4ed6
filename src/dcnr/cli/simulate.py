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
    only: Annotated[str, typer.Option(help="The part of a seed to run, as a failing one prints it.")] = "",
    json: JsonOption = False,
) -> None:
    """Simulate whole networks with faults, one per seed; every invariant is checked. Exit 1 if one breaks.

    A seed that fails is run again in ever smaller parts, and the smallest that fails alike is printed.
    """
    from dcnr import sim

    failed = 0
    part = sim.Only.parse(only)
    for result in sim.run(seed_range(seeds), jobs, trace, part):
        failed += not result.ok
        shrunk = None if result.ok or only else sim.shrink(result)
        if json:
            fields = {"seed": result.seed, "ok": result.ok, "violation": result.violation, "stats": result.stats}
            replay = {"replay": shrunk.outcome.replay} if shrunk else {}
            print_json(fields | {"trace_digest": result.trace_digest} | replay)
            continue
        if trace or not result.ok:
            for line in result.trace:
                say(f"  {line}")
        say(f"seed {result.seed}: {'ok' if result.ok else 'FAILED'}  {result.summary}")
        if not result.ok:
            say(f"  replay it with: {result.replay}")
        if shrunk is not None:
            say(f"  its smallest part of {shrunk.runs} tried: {shrunk.outcome.violation}")
            for fault in shrunk.faults:
                say(f"    {fault}")
            say(f"  replay that with: {shrunk.outcome.replay}")
    if failed:
        raise typer.Exit(EXIT_FAILURE)
