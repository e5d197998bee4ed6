"""``dcnr plan`` and ``dcnr explain``: where VNodes would go, and why they are where they are."""

from __future__ import annotations

import json as json_module
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dcnr.cli.analysing import (
    BatchOption,
    MicrobatchesOption,
    MomentumOption,
    OptimizerOption,
    costing_recipe,
    read_network,
)
from dcnr.cli.output import (
    JsonOption,
    NetworkOption,
    command,
    moment,
    number,
    print_fields,
    print_json,
    print_table,
    say,
    size,
)
from dcnr.cli.peers import parse_size
from dcnr.cli.place import open_client
from dcnr.errors import NoCapacity, UnknownName, UsageError

if TYPE_CHECKING:
    from dcnr.client.blocking import Client
    from dcnr.ids import PeerId, VNodeId
    from dcnr.network.analysis import Network
    from dcnr.orchestrator.placement import Candidate, Problem, Stage
    from dcnr.protocol.messages import EventRecord, NodeInfo, SessionInfo
    from dcnr.session.recipe import Recipe

PNODES_KEYS = ("name", "memory", "gflops", "threads", "numeric_class", "link")
USABLE = ("green", "yellow")


def read_pnodes(file: Path) -> tuple[Candidate, ...]:
    """PNodes from a file: a list of entries with :data:`PNODES_KEYS`. Raises :class:`UsageError`."""
    import yaml

    from dcnr.ids import PeerId
    from dcnr.orchestrator.placement import LINK_BYTES_PER_S, Candidate

    try:
        entries = yaml.safe_load(file.read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(f"{file}: {' '.join(str(error).split())}") from error
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"{file}: found no list, expected one of {{name, memory, gflops}}")
    found: dict[str, Candidate] = {}
    for place, entry in enumerate(entries, start=1):
        where = f"{file}: PNode {place}"
        if not isinstance(entry, dict):
            raise UsageError(f"{where}: found {entry!r}, expected {{name, memory, gflops}}")
        for key in entry:
            if key not in PNODES_KEYS:
                raise UsageError(f"{where}: unknown key {key!r}, expected one of {', '.join(PNODES_KEYS)}")
        name, gflops = str(entry.get("name", f"pnode-{place}")), entry.get("gflops")
        if "memory" not in entry or not isinstance(gflops, int | float) or not 0 < gflops < float("inf"):
            raise UsageError(f"{where}: found {entry}, expected a memory (2GiB) and gflops above 0")
        threads = entry.get("threads", 1)
        if type(threads) is not int or threads < 1:
            raise UsageError(f"{where}: found threads {threads!r}, expected a whole number above 0")
        link = parse_size(str(entry["link"])) if "link" in entry else LINK_BYTES_PER_S
        if link < 1:
            raise UsageError(f"{where}: found link {entry['link']!r}, expected bytes per second (100M) above 0")
        if name in found:
            raise UsageError(f"{where}: found the name {name!r} a second time, expected it once")
        found[name] = Candidate(
            peer=PeerId(name),
            # With another number of threads sums come in another order: other bits.
            numeric_class=str(entry.get("numeric_class", f"{threads} thr")),
            gflops=float(gflops),
            memory_bytes=parse_size(str(entry["memory"])),
            link_bytes_per_s=link,
        )
    return tuple(found.values())


def _candidate(info: NodeInfo) -> Candidate:
    from dcnr.orchestrator.placement import Candidate

    return Candidate(
        peer=info.descriptor.peer,
        numeric_class=info.capabilities.numeric_class,
        gflops=info.capabilities.gflops,
        memory_bytes=info.memory_free_bytes,
        catalogue=info.capabilities.catalogue,
    )


def _problem(run: Network, recipe: Recipe, candidates: Iterable[Candidate]) -> Problem:
    from dcnr.config import LIMITS
    from dcnr.network.types import catalogue_digest
    from dcnr.orchestrator.placement import training_problem

    return training_problem(
        run,
        recipe,
        sorted(candidates, key=lambda candidate: candidate.peer),
        window_extra=LIMITS.window_extra,
        catalogue=catalogue_digest(),
    )


@command
def plan(
    model: Annotated[str, typer.Argument(metavar="NETWORK", help="A network file, or a network's name or id.")],
    pnodes: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="PNodes as YAML or JSON: `- {name: laptop, memory: 4GiB, gflops: 50, threads: 4, link: 100M}`, one a "
            "line; link is in bytes per second, and a numeric_class stands for equal bits instead of threads. Default: "
            "those of the running network.",
        ),
    ] = None,
    batch_size: BatchOption = 8,
    microbatches: MicrobatchesOption = 4,
    optimizer: OptimizerOption = "adamw",
    momentum: MomentumOption = None,
    network: NetworkOption = None,
    json: JsonOption = False,
) -> None:
    """Where a session's VNodes would go, how long its stages take and what crosses the links, before anything runs."""
    from dcnr.network.analysis import analyse
    from dcnr.network.rewrite import TRAINING, rewritten
    from dcnr.orchestrator.placement import solve

    recipe = costing_recipe(batch_size, microbatches, optimizer, momentum)
    from_file = Path(model).is_file()
    written = read_network(Path(model)) if from_file else None
    candidates = None if pnodes is None else read_pnodes(pnodes)
    if written is None or candidates is None:
        with open_client(network) as net:
            written = analyse(net.network(model)[1]) if written is None else written
            if candidates is None:
                candidates = tuple(_candidate(info) for info in net.nodes() if info.colour in USABLE)
    run = rewritten(written, TRAINING)
    answer = solve(_problem(run, recipe, candidates))
    if isinstance(answer, str):
        raise NoCapacity(answer)
    found = forecast(run, recipe, answer.spots, answer.stages)
    for stage in found["stages"]:
        stage["why"] = answer.why[stage["vnodes"][0]]
    if json:
        named = {"network": run.id, "name": run.definition.name, "rewrites": list(run.rewrites)}
        print_json(named | {"window": answer.window} | found)
        return
    print_fields(
        {
            "network": f"{run.definition.name}, {run.id[:12]}",
            "step": f"{found['step_s'] * 1e3:.1f} ms predicted, {number(found['tokens_per_s'])} tokens/s",
            "bubble": f"{found['bubble']:.0%} of the slowest PNode's time, with {microbatches} microbatches",
            "window": f"{answer.window} microbatches open",
        }
    )
    say("")
    order = {vnode: place for place, vnode in enumerate(run.order)}
    print_table(
        ("pnode", "vnodes", "ms/microbatch", "on links", "idle", "why"),
        (
            (
                stage["pnode"][:16],
                _span(stage["vnodes"], order),
                f"{stage['seconds'] * 1e3:.2f}",
                f"{stage['links_s'] * 1e3:.2f}",
                f"{stage['idle']:.0%}",
                stage["why"],
            )
            for stage in found["stages"]
        ),
    )
    if found["links"]:
        say("")
        print_table(
            ("from", "to", "bytes/step"),
            ((link["from"][:16], link["to"][:16], size(link["bytes_per_step"])) for link in found["links"]),
        )


def forecast(
    network: Network, recipe: Recipe, spots: Mapping[VNodeId, PeerId], stages: Mapping[PeerId, Stage]
) -> dict[str, Any]:
    """What a placement promises. Stage times are those that placement minimises: of a PNode, its links included."""
    from dcnr.network.figures import tokens_per_row
    from dcnr.network.memory import edge_bytes

    times = [stage.seconds for stage in stages.values()]
    slowest, count = max(times), recipe.microbatches
    # A pipeline of stages: the slowest works for all microbatches, the others' time fills and drains it once.
    step_s = slowest * count + sum(times) - slowest
    links: dict[tuple[PeerId, PeerId], int] = {}
    for index, edge in enumerate(network.definition.edges):
        ends = spots[edge.source], spots[edge.target]
        if ends[0] != ends[1]:
            sent = edge_bytes(network, index) * recipe.batch_size
            links[ends] = links.get(ends, 0) + sent
            if index in network.gradient_edges:
                links[ends[::-1]] = links.get(ends[::-1], 0) + sent
    hosted: dict[PeerId, list[VNodeId]] = {}
    for vnode in network.order:
        hosted.setdefault(spots[vnode], []).append(vnode)
    return {
        "step_s": step_s,
        "tokens_per_s": recipe.batch_size * tokens_per_row(network) / step_s,
        "bubble": max(0.0, 1.0 - slowest * count / step_s),
        "stages": [
            {
                "pnode": peer,
                "vnodes": vnodes,
                "seconds": stages[peer].seconds,
                "links_s": stages[peer].links_s,
                "idle": 1.0 - stages[peer].seconds * count / step_s,
            }
            for peer, vnodes in hosted.items()
        ],
        "links": [{"from": a, "to": b, "bytes_per_step": sent} for (a, b), sent in sorted(links.items())],
    }


def _span(vnodes: list[VNodeId], order: Mapping[VNodeId, int]) -> str:
    """``3: embedder, head to loss``: what follows each other in the network's order becomes one span."""
    spans: list[list[VNodeId]] = []
    for vnode in vnodes:
        if spans and order[spans[-1][-1]] + 1 == order[vnode]:
            spans[-1].append(vnode)
        else:
            spans.append([vnode])
    shown = ", ".join(span[0] if len(span) == 1 else f"{span[0]} to {span[-1]}" for span in spans)
    return shown if len(vnodes) == 1 else f"{len(vnodes)}: {shown}"


@command
def explain(
    subject: Annotated[
        str, typer.Argument(metavar="VNODE|PNODE|STEP", help="A VNode, a PNode's id, or a step's number.")
    ],
    session: Annotated[str | None, typer.Option(metavar="ID", help="Default: the newest session.")] = None,
    network: NetworkOption = None,
    json: JsonOption = False,
) -> None:
    """Why a VNode is where it is, what a PNode does, how a step went: from what the orchestrator has told."""
    with open_client(network) as net:
        nodes = [info for info in net.nodes() if len(subject) >= 4 and info.descriptor.peer.startswith(subject)]
        if len(nodes) == 1:
            found = _explain_pnode(net, nodes[0])
        else:
            sessions = net.sessions()
            chosen = [info for info in sessions if session is None or info.session.startswith(session)]
            if not chosen:
                raise UnknownName(f"no session {session!r}" if session else "no session yet: `dcnr train` makes one")
            step = int(subject) if subject.isdecimal() else None
            found = _explain_vnode(net, chosen[-1], subject) if step is None else _explain_step(net, chosen[-1], step)
    if json:
        print_json(found)
    else:
        fields = {name: value for name, value in found.items() if value not in ("", None, [])}
        print_fields(
            {
                name.removesuffix("_s").removesuffix("_unix").replace("_", " "): _text(name, value)
                for name, value in fields.items()
            }
        )


def _text(name: str, value: Any) -> str:
    """A value as people read it."""
    match name:
        case "stages":
            return "; ".join(map(_stage_text, value))
        case "links":
            return "; ".join(
                f"{size(link['bytes_per_step'])} a step from {link['from'][:12]} to {link['to'][:12]}" for link in value
            )
        case "predicted_step_s" | "measured_step_s":
            return f"{value * 1e3:.1f} ms"
        case "loss" | "learning_rate" | "gradient_scale":
            return f"{value:.6g}"
        case "done_unix_s":
            return moment(value)
        case "bubble":
            return f"{value:.0%} of the slowest PNode's time"
        case _:
            return str(value)


def _stage_text(stage: Mapping[str, Any]) -> str:
    text = f"{stage['pnode'][:12]} {stage['seconds'] * 1e3:.2f} ms/microbatch predicted, {stage['links_s'] * 1e3:.2f} on links"
    if "measured_s" in stage:
        text += f", {stage['measured_s'] * 1e3:.2f} measured without links"
    return f"{text}, idle for {stage['idle']:.0%} of a step"


def _networks(net: Client, info: SessionInfo) -> tuple[Network, Network]:
    """A session's network as its file has it, and as it is trained."""
    from dcnr.network.analysis import analyse
    from dcnr.network.rewrite import rewritten
    from dcnr.session.record import Record

    written = analyse(net.network(info.network)[1])
    return written, rewritten(written, Record.from_bytes(info.record).rewrites)


def _expected(
    net: Client, info: SessionInfo, spots: Mapping[VNodeId, PeerId], peer: str | None = None
) -> dict[str, Any]:
    """What a session's placement promises and what was measured; of ``peer`` alone, or of all. Empty: a PNode is away."""
    from dcnr.orchestrator.placement import predicted
    from dcnr.session.record import Record

    candidates = [_candidate(node) for node in net.nodes()]
    if not spots or not {c.peer for c in candidates}.issuperset(spots.values()):
        return {}
    recipe, run = Record.from_bytes(info.record).recipe, _networks(net, info)[1]
    found = forecast(run, recipe, spots, predicted(_problem(run, recipe, candidates), spots))
    # What segments have measured is of the newest placement.
    measured = info.measured if spots == {place.vnode: place.peer for place in info.placement} else ()
    for stage in found["stages"]:
        times = [time.forward_s + time.backward_s for time in measured if time.peer == stage["pnode"]]
        if times:
            stage["measured_s"] = sum(times)
    return {
        "predicted_step_s": found["step_s"],
        "bubble": found["bubble"],
        "stages": [stage for stage in found["stages"] if peer in (None, stage["pnode"])],
        "links": [link for link in found["links"] if peer in (None, link["from"], link["to"])],
    }


Told = list[tuple["EventRecord", dict[str, Any]]]
"""Entries of the orchestrator's event log with their data, oldest first."""


def _told(net: Client, *kinds: str) -> Told:
    return [(record, json_module.loads(record.data)) for record in net.events() if record.kind in kinds]


def _explain_vnode(net: Client, info: SessionInfo, name: str) -> dict[str, Any]:
    from dcnr.ids import VNodeId
    from dcnr.network.rewrite import computed_in
    from dcnr.network.types import nearest

    vnode, held = VNodeId(name), {place.vnode: place.peer for place in info.placement}
    inside = ""
    if vnode not in held:
        written, run = _networks(net, info)
        absorbed = computed_in(written, run)
        if vnode not in absorbed:
            known = tuple(sorted({*held, *absorbed}))
            raise UnknownName(f"no VNode {vnode!r} in session {info.session[:8]}: expected {nearest(vnode, known)}")
        vnode, rewrite = absorbed[vnode]
        inside = f"{name} is computed inside {vnode} (rewrite {rewrite})"
    placed = [data for record, data in _told(net, "placed") if record.session == info.session]
    found = {"vnode": vnode, "computed_inside": inside, "session": info.session, "pnode": held[vnode]}
    if placed:
        last, hosts = placed[-1], [entry["vnodes"].get(vnode) for entry in placed]
        found |= {
            "since_log_entry": last["index"],
            "why": last["why"].get(vnode, ""),
            "loaded_from": f"the checkpoint of step {last['base_step']}"
            if last["base_step"]
            else "its initial weights",
            "moves": sum(a != b for a, b in pairwise(hosts)),
        }
    else:
        found["why"] = "told before this orchestrator started"
    if info.state == "waiting":
        # Where it was says nothing about where it will be.
        return found | {"pnode": "", "was_on": held[vnode], "why": f"session {info.session[:8]} waits: {info.reason}"}
    return found | _expected(net, info, held, held[vnode])


def _explain_pnode(net: Client, info: NodeInfo) -> dict[str, Any]:
    peer, here = info.descriptor.peer, {entry.partition("/")[0] for entry in info.vnodes}
    why: dict[str, str] = {}
    lost: list[str] = []
    for record, data in _told(net, "placed", "pnode_lost"):
        if record.kind == "pnode_lost" and data["peer"] == peer:
            lost.append(data["reason"])
        elif record.kind == "placed" and record.session in here:
            # The newest placement of a session is told last.
            mine = (data["why"][vnode] for vnode, host in data["vnodes"].items() if host == peer)
            why[record.session] = next(mine, "it hosts an instance that only reads")
    expected = [
        _expected(net, run, {place.vnode: place.peer for place in run.placement}, peer)
        for run in net.sessions()
        if run.session in here
    ]
    return {
        "pnode": peer,
        "state": f"{info.colour}, heard {info.silent_s:.1f} s ago",
        "offers": f"{info.capabilities.gflops:.0f} GFLOP/s, {info.capabilities.threads} threads, "
        f"{size(info.capabilities.memory_bytes)}, class {info.capabilities.numeric_class[:8]}",
        "free": size(info.memory_free_bytes),
        "hosts": ", ".join(entry.partition("/")[2] for entry in info.vnodes) or "nothing",
        "why": "; ".join(f"session {session[:8]}: {reason}" for session, reason in sorted(why.items()))
        or ("" if info.vnodes else _idle(info.colour)),
        "lost": "; ".join(lost),
        "stages": [stage for each in expected for stage in each.get("stages", ())],
        "links": [link for each in expected for link in each.get("links", ())],
    }


def _idle(colour: str) -> str:
    if colour not in USABLE:
        return f"it is {colour}: nothing is placed on it"
    return "no running session needs it, or using it would make the slowest stage no faster"


def _explain_step(net: Client, info: SessionInfo, step: int) -> dict[str, Any]:
    from dcnr.session.events import StepDone

    if not 1 <= step <= info.step:
        raise UsageError(
            f"step {step} of session {info.session[:8]}: found {info.step} steps done, expected one of them"
        )
    event = next(e for e in net.session(info.session).events(step - 1) if isinstance(e, StepDone) and e.step == step)
    placed: dict[str, Any] = {}
    before_unix_s = done_unix_s = None
    for record, data in _told(net, "placed", "step_done"):
        if record.session == info.session and record.kind == "placed":
            placed = data
        elif record.session == info.session and data["step"] == step - 1:
            before_unix_s = record.unix_s
        elif record.session == info.session and data["step"] == step:
            done_unix_s = record.unix_s
            break
    hosts = Counter(placed.get("vnodes", {}).values())
    return {
        "step": step,
        "session": info.session,
        "loss": event.loss,
        "learning_rate": event.learning_rate,
        "gradient_scale": event.grad_scale,
        "tokens": event.tokens,
        "done_unix_s": done_unix_s,
        "measured_step_s": done_unix_s - before_unix_s if done_unix_s and before_unix_s else None,
        "placement": f"log entry {placed['index']}: "
        + ", ".join(f"{count} VNodes on {host[:12]}" for host, count in sorted(hosts.items()))
        if placed
        else "",
    } | _expected(net, info, placed.get("vnodes", {}))
