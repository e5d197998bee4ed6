"""``dcnr train``: create what is missing, create a session, follow it."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from dcnr.cli.output import JsonOption, NetworkOption, command, print_json, say, warn
from dcnr.cli.place import open_client
from dcnr.errors import NotInThisVersion, UsageError

if TYPE_CHECKING:
    from dcnr.client.blocking import Run
    from dcnr.session.recipe import Optimizer, Schedule

BUILT = {
    "--mode": ("exact",),
    "--exact": ("best",),
    "--delay": ("0",),
    "--replicas": ("1",),
}
"""Values of the contract's options that this version builds; an option that is not given is always fine."""

LogDirOption = Annotated[
    Path | None,
    typer.Option(
        "--log-dir",
        metavar="DIR",
        help="Keep what is followed: DIR/<session>.jsonl, and scalars for TensorBoard. Goes on where it ended.",
    ),
]

NAMED = {
    "--mode": ("exact", "eventual"),
    "--exact": ("strict", "best"),
    "--delay": ("0", "1"),
}
"""Values that the contract names."""

ADAPTIVE = ("adamw", "adam", "muon")
BELONGS = {
    "--betas": ADAPTIVE,
    "--eps": ADAPTIVE,
    "--momentum": ("sgd", "muon"),
}
"""Options to the optimizers that have them; muon takes betas and eps for what is no matrix."""


def refuse_unbuilt(option: str, value: object) -> None:
    """Raises :class:`NotInThisVersion` for what the contract names, :class:`UsageError` for what nobody names."""
    if value is None or str(value) in BUILT[option]:
        return
    if option in NAMED and str(value) not in NAMED[option]:
        raise UsageError(f"{option} {value}: this version has {' and '.join(BUILT[option])}")
    raise NotInThisVersion(f"{option} {value} is not in this version")


def make_optimizer(
    kind: str,
    lr: float,
    betas: str | None,
    eps: float | None,
    weight_decay: float | None,
    momentum: float | None,
) -> Optimizer:
    """The optimizer of the options; what is not given (``None``) has the Python function's default.

    Raises :class:`UsageError` for an option that would have no effect.
    """
    from dcnr.session.recipe import OPTIMIZERS, SGD, Adam, AdamW, Muon

    for option, value in (("--betas", betas), ("--eps", eps), ("--momentum", momentum)):
        if value is not None and kind in OPTIMIZERS and kind not in BELONGS[option]:
            raise UsageError(
                f"{option} {value}: --optimizer {kind} has none, it belongs to {', '.join(BELONGS[option])}"
            )
    try:
        first, second = (float(part) for part in (betas or "0.9,0.999").split(","))
    except ValueError:
        raise UsageError(f"--betas takes two numbers with a comma, found {betas!r}") from None
    pair = (first, second)
    eps = 1e-8 if eps is None else eps
    match kind:
        case "adamw":
            return AdamW(lr=lr, betas=pair, eps=eps, weight_decay=0.01 if weight_decay is None else weight_decay)
        case "adam":
            return Adam(lr=lr, betas=pair, eps=eps, weight_decay=weight_decay or 0.0)
        case "sgd":
            return SGD(lr=lr, momentum=momentum or 0.0, weight_decay=weight_decay or 0.0)
        case "muon":
            return Muon(
                lr=lr,
                momentum=0.95 if momentum is None else momentum,
                weight_decay=weight_decay or 0.0,
                betas=pair,
                eps=eps,
            )
        case other:
            raise UsageError(f"unknown optimizer {other!r}: adamw, adam, sgd or muon")


def refuse_idle(
    steps: int, schedule: Schedule, clip_norm: float, clip_scope: str, eval_every: int, batches: int | None
) -> None:
    """Raises :class:`UsageError` for an option that another one leaves without effect."""
    if schedule.warmup > steps:
        raise UsageError(
            f"--warmup {schedule.warmup}: --steps {steps} end before --lr is reached, expected at most as many"
        )
    if schedule.min_lr and schedule.kind == "constant":
        raise UsageError(f"--min-lr {schedule.min_lr:g}: --schedule constant stays at --lr")
    if clip_scope != "network" and clip_norm == 0:
        raise UsageError(f"--clip-scope {clip_scope}: --clip-norm 0 clips nothing")
    if batches is not None and not eval_every:
        raise UsageError(f"--eval-batches {batches}: nothing is evaluated without --eval-every")


@command
def train(
    model: Annotated[str, typer.Argument(metavar="FILE|NAME|ID", help="A network file, or a network that exists.")],
    data: Annotated[str, typer.Option(metavar="PATH|HANDLE", help="Files (a path, folder or glob), or a dataset.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer updates.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="For text files: bpe:N, bytes or a tokenizer file. [default: bpe of the network's vocabulary]"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 8,
    microbatches: Annotated[int, typer.Option(min=1, help="Slices of a batch; must divide it.")] = 4,
    mode: Annotated[str, typer.Option(help="exact")] = "exact",
    exact: Annotated[str, typer.Option(help="best")] = "best",
    delay: Annotated[int, typer.Option(help="0")] = 0,
    replicas: Annotated[int, typer.Option(help="1")] = 1,
    optimizer: Annotated[str, typer.Option(help="adamw, adam, sgd or muon.")] = "adamw",
    lr: Annotated[float, typer.Option(help="Learning rate at its peak.")] = 3e-4,
    betas: Annotated[
        str | None,
        typer.Option(metavar="B1,B2", help="Decay rates of adamw, adam and muon. [default: 0.9,0.999]"),
    ] = None,
    eps: Annotated[float | None, typer.Option(help="Epsilon of adamw, adam and muon. [default: 1e-8]")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Default: 0.01 for adamw, else 0.")] = None,
    momentum: Annotated[float | None, typer.Option(help="Of sgd and muon. Default: 0.95 for muon, 0 for sgd.")] = None,
    schedule: Annotated[
        str,
        typer.Option(help="After the warm-up: cosine, linear, wsd (falls in the last fifth of the steps) or constant."),
    ] = "cosine",
    warmup: Annotated[int, typer.Option(min=0, help="Steps of linear warm-up, at most --steps.")] = 0,
    min_lr: Annotated[float, typer.Option(help="Where the learning rate ends; constant stays at --lr.")] = 0.0,
    clip_norm: Annotated[float, typer.Option(help="Largest norm of the gradient; 0 = no clipping.")] = 1.0,
    clip_scope: Annotated[
        str,
        typer.Option(help="Whose norm: network (all together) or vnode (each its own, without waiting for the rest)."),
    ] = "network",
    precision: Annotated[
        str,
        typer.Option(help="float32, float64 or bf16, instead of the network's own: what its file calls precision."),
    ] = "",
    eval_every: Annotated[
        int,
        typer.Option(
            min=0, help="Evaluate the first commit at or after every so many steps (see --checkpoint-every); 0 = never."
        ),
    ] = 0,
    eval_batches: Annotated[int | None, typer.Option(min=1, help="Batches of an evaluation. [default: 4]")] = None,
    checkpoint_every: Annotated[
        int, typer.Option(min=0, help="Most steps between checkpoints; 0 = none but the last.")
    ] = 20,
    init_from: Annotated[
        str,
        typer.Option(metavar="SESSION[@STEP]", help="Begin with the weights of a commit; the optimizer starts anew."),
    ] = "",
    seed: Annotated[int, typer.Option(help="Of initial weights, dropout and the order of the rows.")] = 0,
    log_dir: LogDirOption = None,
    detach: Annotated[bool, typer.Option("--detach", help="Print the session's id and leave it running.")] = False,
    network: NetworkOption = None,
    json: JsonOption = False,
) -> None:
    """Train a network on data and follow it. Ctrl-C detaches; the session goes on."""
    from dcnr.network.node_type import PRECISIONS
    from dcnr.session.recipe import Schedule

    for option, value in (
        ("--mode", mode),
        ("--exact", exact),
        ("--delay", delay),
        ("--replicas", replicas),
    ):
        refuse_unbuilt(option, value)
    if precision and precision not in PRECISIONS:
        raise UsageError(f"--precision {precision}: one of {', '.join(PRECISIONS)}")
    if log_dir is not None:
        if detach:
            raise UsageError(
                "--log-dir is written by who follows, and --detach follows nothing: "
                "later, `dcnr session follow ID --log-dir DIR` writes all steps"
            )
        from dcnr.cli.log_dir import prepare

        prepare(log_dir)
    chosen = make_optimizer(optimizer, lr, betas, eps, weight_decay, momentum)
    planned = Schedule(kind=schedule, warmup=warmup, min_lr=min_lr)
    refuse_idle(steps, planned, clip_norm, clip_scope, eval_every, eval_batches)
    with open_client(network) as net:
        run = net.train(
            Path(model) if Path(model).is_file() else model,
            data,
            steps=steps,
            tokenizer=tokenizer,
            batch_size=batch_size,
            microbatches=microbatches,
            optimizer=chosen,
            schedule=planned,
            clip_norm=clip_norm,
            clip_scope=clip_scope,
            precision=precision,
            checkpoint_every=checkpoint_every,
            eval_every=eval_every,
            eval_batches=4 if eval_batches is None else eval_batches,
            init_from=init_from,
            seed=seed,
        )
        if json:
            print_json({"session": run.id})
        else:
            say(f"session {run.id}" if not detach else run.id)
        if not detach:
            follow_or_detach(run, steps, network, json, log_dir)


def follow_or_detach(run: Run, steps: int, network: str | None, json: bool, log_dir: Path | None) -> None:
    """Follow to the end; Ctrl-C leaves the session running and says how to come back.

    With ``log_dir``, from the first step that its files do not have.
    """
    from dcnr.cli.display import follow

    try:
        if log_dir is None:
            follow(run, steps, json)
        else:
            from dcnr.cli.log_dir import SessionLog

            with SessionLog(log_dir, run.id) as log:
                follow(log.record(run.events(log.last_step)), steps, json)
    except KeyboardInterrupt:
        where = f" --network {network}" if network else ""
        kept = f" --log-dir {quote(str(log_dir))}" if log_dir is not None else ""
        warn("detached; the session goes on")
        warn(f"  follow it: dcnr session follow {run.id}{where}{kept}")
        warn(f"  stop it:   dcnr session stop {run.id}{where}")
