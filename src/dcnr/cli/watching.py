"""What the network is doing, and what its model says."""

from __future__ import annotations

import json as json_module
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from dcnr.cli.output import (
    JsonOption,
    NetworkOption,
    command,
    duration,
    print_fields,
    print_json,
    print_table,
    say,
    size,
    warn,
)
from dcnr.cli.place import open_client

if TYPE_CHECKING:
    from dcnr.protocol.messages import NodeInfo

nodes_app = typer.Typer(invoke_without_command=True)


@nodes_app.callback()
@command
def nodes(context: typer.Context, network: NetworkOption = None, json: JsonOption = False) -> None:
    """The PNodes: what they offer, how they are, what they host."""
    if context.invoked_subcommand is not None:
        return
    with open_client(network) as net:
        infos = net.nodes()
    if json:
        for info in infos:
            print_json(
                {
                    "peer": info.descriptor.peer,
                    "addresses": info.descriptor.addresses,
                    "colour": info.colour,
                    "leaving": info.leaving,
                    "silent_s": info.silent_s,
                    "cores": info.capabilities.cores,
                    "threads": info.capabilities.threads,
                    "memory_bytes": info.capabilities.memory_bytes,
                    "memory_free_bytes": info.memory_free_bytes,
                    "gflops": info.capabilities.gflops,
                    "numeric_class": info.capabilities.numeric_class,
                    "class_facts": info.capabilities.class_facts,
                    "vnodes": info.vnodes,
                    "tasks_done": info.tasks_done,
                }
            )
        return
    print_table(
        ("pnode", "address", "state", "threads", "memory free", "GFLOP/s", "class", "vnodes", "tasks"),
        (
            (
                info.descriptor.peer[:12],
                " ".join(info.descriptor.addresses),
                f"{info.colour}, leaving" if info.leaving else info.colour,
                info.capabilities.threads,
                size(info.memory_free_bytes),
                f"{info.capabilities.gflops:.0f}",
                info.capabilities.numeric_class[:8],
                len(info.vnodes),
                info.tasks_done,
            )
            for info in infos
        ),
    )


@nodes_app.command("drain")
@command
def drain(
    peer: Annotated[str, typer.Argument(help="As `dcnr nodes` shows it; its beginning is enough.")],
    undo: Annotated[bool, typer.Option("--undo", help="Let it take VNodes again.")] = False,
    network: NetworkOption = None,
) -> None:
    """A PNode gives up its VNodes at a step boundary and takes no new ones, until it starts anew or --undo."""
    with open_client(network) as net:
        before = {info.descriptor.peer: info for info in net.nodes()}
        found = net.drain(peer, not undo)
    say(_drained(before.get(found), found[:12], undo=undo))


def _drained(before: NodeInfo | None, name: str, *, undo: bool) -> str:
    """``before``: what the PNode was before it was told."""
    leaving, held = (before.leaving, len(before.vnodes)) if before is not None else (False, 0)
    if undo:
        return f"PNode {name} takes VNodes again" if leaving else f"PNode {name} was not drained: it takes VNodes"
    if not leaving:
        return f"PNode {name} gives up its VNodes, if there is another place for them: see dcnr nodes"
    if not held:
        return f"PNode {name} is drained already: it hosts nothing"
    return f"PNode {name} is giving up its VNodes already: it hosts {held} as long as there is no other place for them"


@command
def status(network: NetworkOption = None, json: JsonOption = False) -> None:
    """The orchestrator that is asked in one look, and where the others over its store are."""
    with open_client(network) as net:
        now = net.status()
    fields = {
        "orchestrator": now.descriptor.peer,
        "addresses": now.descriptor.addresses,
        "uptime_s": round(now.uptime_s, 1),
        "pnodes": now.nodes,
        "sessions_running": now.sessions_running,
        "sessions": now.sessions,
        "store": now.store,
        "resident_bytes": now.resident_bytes,
        "others": now.others,
    }
    if json:
        print_json(fields)
    else:
        print_fields(
            {
                "orchestrator": now.descriptor.peer[:12],
                "addresses": " ".join(now.descriptor.addresses),
                "up for": duration(now.uptime_s),
                "pnodes": now.nodes,
                "sessions": f"{now.sessions}, {now.sessions_running} running",
                "store": now.store,
                "memory": size(now.resident_bytes),
            }
            | ({"others": " ".join(now.others)} if now.others else {})
        )


@command
def events(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new events until Ctrl-C.")] = False,
    after: Annotated[int, typer.Option(min=0, help="Only events after this sequence number.")] = 0,
    network: NetworkOption = None,
    json: JsonOption = False,
) -> None:
    """What was decided and noticed, and why; with --json the whole of it."""
    from dcnr.adapters.telemetry import in_short

    with open_client(network) as net:
        for record in net.events(after, follow):
            data = json_module.loads(record.data)
            if json:
                print_json(
                    {
                        "sequence": record.sequence,
                        "unix_s": record.unix_s,
                        "kind": record.kind,
                        "session": record.session,
                        "data": data,
                    }
                )
                continue
            clock = time.strftime("%H:%M:%S", time.localtime(record.unix_s))
            fields = in_short(data)
            say(f"{record.sequence:>6}  {clock}  {record.session[:8] or '-':<8}  {record.kind:<20}  {fields}")


@command
def generate(
    target: Annotated[
        str, typer.Argument(metavar="NETWORK", help="A network or a session: name, id, or its beginning.")
    ],
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token always.")] = 0.8,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens of this mass.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    network: NetworkOption = None,
    json: JsonOption = False,
) -> None:
    """Streaming text from the newest commit of the network's newest session."""
    with open_client(network) as net:
        info = net.newest_commit(target)
        pieces = net.generate(info.session, prompt, max_tokens, temperature, top_p, seed)
        if json:
            text = "".join(pieces)
            print_json({"session": info.session, "step": info.committed_step, "prompt": prompt, "text": text})
            return
        warn(f"{info.network_name}, session {info.session[:8]}, step {info.committed_step}")
        # With the first piece, so that a prompt which is refused is not printed.
        sys.stdout.write(prompt + next(pieces, ""))
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
