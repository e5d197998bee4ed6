"""``dcnr chaos``: real faults on the processes of a running ``dcnr up``, and what becomes of a session under them.

:mod:`dcnr.cli.chaos_plan` draws the faults, :mod:`dcnr.cli.chaos_run` does them and watches, :mod:`dcnr.cli.chaos_report`
judges.
"""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dcnr.cli.chaos_plan import faults, parse_duration, parse_kinds, windows
from dcnr.cli.output import EXIT_FAILURE, JsonOption, command, print_json, print_table, say
from dcnr.errors import DCNRError, Unavailable, UsageError

if TYPE_CHECKING:
    from dcnr.cli.chaos_report import Report

WINDOWS = 2
"""Stretches between commits that are verified, beside the last one: each is recomputed in one process."""


@command
def chaos(
    session: Annotated[str, typer.Option(metavar="ID", help="The session to watch: its id, or its beginning.")],
    lasting: Annotated[
        str, typer.Option("--for", envvar="DCNR_CHAOS_FOR", metavar="DURATION", help="As 90s, 5m, 1h.")
    ] = "5m",
    kill_every: Annotated[str, typer.Option(metavar="DURATION", help="From fault to fault, on average.")] = "20s",
    seed: Annotated[int | None, typer.Option(help="The same one plans the same faults. Default: drawn.")] = None,
    kinds: Annotated[
        str | None,
        typer.Option(
            "--faults",
            envvar="DCNR_CHAOS_FAULTS",
            metavar="KIND,...",
            help="Of kill, stop, restart, partition. Default: all; partition needs `dcnr up --cuttable`.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Kill, stop, restart and cut off processes of this machine's `dcnr up` at random, and see what becomes of a session.

    Its PNodes, and the orchestrator that owns the session at the time: what befalls the others costs it nothing.
    At the end steps of random stretches are recomputed in one process and compared bit by bit. Exits with 0 only if the
    session went on after every fault, no step was lost, and every bit is equal.
    """
    # Before gRPC is loaded: this process starts others later on.
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    from dcnr.cli.chaos_report import COLUMNS
    from dcnr.cli.chaos_run import Watch, hand, read_processes
    from dcnr.cli.place import read_up_note
    from dcnr.cli.verify import recompute
    from dcnr.wiring import connect

    for_s, every_s = parse_duration("--for", lasting), parse_duration("--kill-every", kill_every)
    seed = secrets.randbelow(1 << 32) if seed is None else seed
    note = read_up_note()
    if note is None:
        raise Unavailable(
            "`dcnr up` is not running on this machine, and chaos befalls only processes of its own network"
        )
    processes = read_processes(note.home, note.pid)
    names = [*(pnode.name for pnode in processes.pnodes), "the owner"]
    chosen = parse_kinds(kinds, cuttable=bool(processes.switch))
    planned = faults(seed, for_s=for_s, every_s=every_s, kinds=chosen, victims=len(names))
    if every_s > for_s or not planned:
        raise UsageError(
            f"--kill-every {kill_every} is too rare for --for {lasting}: no fault would come, or hardly (seed {seed}). "
            f"The first comes after {0.5 * every_s:g} to {1.5 * every_s:g} s"
        )
    tell = (lambda line: None) if json else say
    owners = " or ".join(orchestrator.name for orchestrator in processes.orchestrators)
    with connect(note.address) as net, hand(note.home, note.pid) as striking:
        run = net.session(session)
        watch = Watch(net, run, striking, planned, tell)
        tell(f"seed {seed}: {len(planned)} faults in {for_s:g} s among {', '.join(names)} of the session ({owners})")
        for fault in planned:
            tell(f"  at {fault.at_s:6.1f} s  {names[fault.victim]}: {fault.what}")
        watch.go(for_s, windows(seed, for_s=for_s, count=WINDOWS))
        report = watch.report
        if not json:  # Before what takes long.
            print_table(COLUMNS, report.table())
        for evidence in watch.evidence:
            tell(f"recomputing steps {evidence.base_step + 1} to {evidence.last_step} in one process")
            try:
                report.verdicts.append(recompute(net.address, evidence))
            except DCNRError as error:
                report.problems.append(f"steps {evidence.base_step + 1} to {evidence.last_step}: {error}")
    show(report, {"session": run.id, "seed": seed, "plan": [fault.to_json() for fault in planned]}, json)


def show(report: Report, head: dict[str, Any], json: bool) -> None:
    """Print the report; raises :class:`typer.Exit` where it is not what is promised."""
    complaints = list(report.complaints())
    if json:
        print_json(head | report.to_json())
    else:
        for verdict in report.verdicts:
            judged = "equal, bit by bit" if verdict.equal else "DIFFERENT"
            say(f"steps {verdict.base_step + 1} to {verdict.last_step}: {judged} ({verdict.sha256_network[:16]})")
        for complaint in complaints:
            say(f"NOT as promised: {complaint}")
        if not complaints:
            say(f"step {report.step}: the session went on after every fault, no step was lost, every bit is equal")
    if complaints:
        raise typer.Exit(EXIT_FAILURE)
