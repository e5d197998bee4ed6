"""``dcnr session``: training runs, resumable and checkable."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dcnr.cli.output import (
    EXIT_FAILURE,
    JsonOption,
    NetworkOption,
    command,
    moment,
    print_fields,
    print_json,
    print_table,
    say,
    warn,
)
from dcnr.cli.place import open_client
from dcnr.cli.training import LogDirOption, follow_or_detach

if TYPE_CHECKING:
    from dcnr.protocol.messages import SessionInfo

app = typer.Typer(help="Training runs: every one can be followed, stopped, resumed and verified.", no_args_is_help=True)

SessionArgument = Annotated[str, typer.Argument(metavar="ID", help="A session's id, or its beginning (4 characters).")]


def _facts(info: SessionInfo) -> dict[str, Any]:
    return {
        "session": info.session,
        "state": info.state,
        "reason": info.reason,
        "network": info.network,
        "network_name": info.network_name,
        "dataset": info.dataset,
        "step": info.step,
        "steps": info.steps,
        "loss": info.loss if info.step and info.loss == info.loss else None,
        "committed_step": info.committed_step,
        "epoch": info.epoch,
        "owner": info.owner,
        "owner_addresses": list(info.owner_addresses),
        "created_unix_s": info.created_unix_s,
    }


@app.command("list")
@command
def list_sessions(network: NetworkOption = None, json: JsonOption = False) -> None:
    """All sessions, newest last."""
    with open_client(network) as net:
        infos = net.sessions()
    if json:
        for info in infos:
            print_json(_facts(info))
        return
    print_table(
        ("session", "network", "state", "step", "loss", "commit", "reason"),
        (
            (
                info.session[:12],
                info.network_name,
                info.state,
                f"{info.step}/{info.steps}",
                f"{info.loss:.4f}" if info.step and info.loss == info.loss else "-",  # Its owner does not answer.
                info.committed_step,
                info.reason,
            )
            for info in infos
        ),
    )


@app.command("show")
@command
def show(session: SessionArgument, network: NetworkOption = None, json: JsonOption = False) -> None:
    """One session: state, recipe, placement, and each node's optimizer where it is not the session's."""
    with open_client(network) as net:
        run = net.session(session)
        info, files = run.info(), run.files()
    record = json_module.loads(files.record)
    definition = json_module.loads(files.definition)
    init = record["init"]
    optimizers = {n["id"]: n["config"]["optimizer"] for n in definition["nodes"] if "optimizer" in n["config"]}
    placement = {location.vnode: location.peer for location in info.placement}
    commits = [commit.step for commit in files.commits]
    if json:
        print_json(
            {
                **_facts(info),
                "recipe": record["recipe"],
                "init_from": None if init is None else {"session": init[0], "step": init[1], "manifest": init[2]},
                "optimizers": optimizers,
                "placement": placement,
                "commits": commits,
                "log_entries": len(files.entries),
            }
        )
        return
    facts = {name.removesuffix("_unix_s").replace("_", " "): value for name, value in _facts(info).items()}
    facts |= {"created": moment(info.created_unix_s), "commits": commits, "log entries": len(files.entries)}
    facts["owner addresses"] = " ".join(info.owner_addresses)
    print_fields({name: value for name, value in facts.items() if value not in ("", None)})
    if init is not None:
        say(f"began with the weights of session {init[0]} at step {init[1]}")
    say("recipe")
    print_fields({f"  {name}": value for name, value in record["recipe"].items()})
    if optimizers:
        say("optimizers of nodes that name their own")
        print_fields({f"  {node}": kind for node, kind in optimizers.items()})
    say("placement")
    for peer in sorted(set(placement.values())):
        say(f"  {peer[:12]}  {' '.join(v for v, p in placement.items() if p == peer)}")


@app.command("follow")
@command
def follow(
    session: SessionArgument,
    log_dir: LogDirOption = None,
    network: NetworkOption = None,
    json: JsonOption = False,
) -> None:
    """Follow a session from its first step, or from where --log-dir ends; Ctrl-C leaves it running."""
    if log_dir is not None:
        from dcnr.cli.log_dir import prepare

        prepare(log_dir)
    with open_client(network) as net:
        run = net.session(session)
        follow_or_detach(run, run.info().steps, network, json, log_dir)


@app.command("stop")
@command
def stop(session: SessionArgument, network: NetworkOption = None, json: JsonOption = False) -> None:
    """End a session; `resume` goes on from its newest commit."""
    _control(session, "stop", network, json)


@app.command("suspend")
@command
def suspend(session: SessionArgument, network: NetworkOption = None, json: JsonOption = False) -> None:
    """Store the state after the next step, then end a session; `resume` goes on from there."""
    _control(session, "suspend", network, json)


@app.command("gc")
@command
def gc(
    session: SessionArgument,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    network: NetworkOption = None,
    json: JsonOption = False,
) -> None:
    """Delete from the store what no commit of a session names: what abandoned checkpoints have left."""
    with open_client(network) as net:
        run = net.session(session)
        keys = run.collect_garbage(delete=not dry_run)
    if json:
        print_json({"session": run.id, "deleted": not dry_run, "keys": list(keys)})
        return
    for key in keys:
        say(key)
    done = "would be deleted" if dry_run else "deleted"
    say(f"{len(keys)} object{'s' * (len(keys) != 1)} {done}")


@app.command("resume")
@command
def resume(session: SessionArgument, network: NetworkOption = None, json: JsonOption = False) -> None:
    """Go on with a session from its newest commit."""
    _control(session, "resume", network, json)


def _control(session: str, action: str, network: str | None, json: bool) -> None:
    with open_client(network) as net:
        run = net.session(session)
        state = {"stop": run.stop, "suspend": run.suspend, "resume": run.resume}[action]()
    if json:
        print_json({"session": run.id, "state": state})
    else:
        say(f"session {run.id}: {state}")


@app.command("validate")
@command
def validate(session: SessionArgument, network: NetworkOption = None, json: JsonOption = False) -> None:
    """Loss and perplexity of the newest commit over all rows that the dataset holds out."""
    with open_client(network) as net:
        found = net.session(session).validate()
    if json:
        print_json(asdict(found))
        return
    perplexity = "" if found.perplexity is None else f"  perplexity {found.perplexity:,.2f}"
    say(f"step {found.step}: validation loss {found.loss:.4f}{perplexity}  ({found.rows} rows)")


@app.command("verify")
@command
def verify(
    session: SessionArgument,
    first: Annotated[
        int,
        typer.Option("--from", envvar="DCNR_SESSION_VERIFY_FROM", min=0, metavar="S", help="Default: the beginning."),
    ] = 0,
    last: Annotated[
        int | None,
        typer.Option("--to", envvar="DCNR_SESSION_VERIFY_TO", min=1, metavar="T", help="Default: the newest commit."),
    ] = None,
    network: NetworkOption = None,
    json: JsonOption = False,
) -> None:
    """Recompute steps in one process from a checkpoint and compare losses and states, bit by bit.

    The range is widened to commits, for only commits have hashes of states: everything from the newest commit that is
    kept at or before S (else from the beginning) is computed. The newest two are kept.
    """
    from dcnr.cli.verify import begun_before, collect, recompute

    with open_client(network) as net:
        evidence = collect(net, net.session(session), first, last)

        def told(step: int, equal: bool) -> None:
            if not json and (not equal or step % 10 == 0):
                say(f"step {step}: loss {'equal' if equal else 'DIFFERENT'}")

        if not json:
            say(f"recomputing steps {evidence.base_step + 1} to {evidence.last_step} in one process")
            if reason := begun_before(evidence.base_step, first):
                say(reason)
        verdict = recompute(net.address, evidence, told)
    if json:
        print_json(verdict.to_json())
    else:
        say(f"network   {verdict.sha256_network}")
        say(f"recomputed {verdict.sha256_recomputed}")
        for difference in verdict.differences:
            warn(f"  {difference}")
        say("equal" if verdict.equal else "different")
    if not verdict.equal:
        raise typer.Exit(EXIT_FAILURE)
