"""How a session trains: every choice that can reach a bit of a weight, as data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dcnr.errors import UsageError
from dcnr.network.types import nearest

OPTIMIZERS = ("adamw", "adam", "sgd", "muon")
IMPLEMENTATIONS = ("fused", "foreach", "for-loop")
CLIP_SCOPES = ("network", "vnode")
COUNT_MOST = 2**53
"""Largest step, batch and so on: up to here a count is a float without rounding."""
SEED_MOST = 2**63 - 1
"""Largest seed, of either sign: what random generators take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """An optimizer by name. ``implementation`` is recorded because fused and foreach kernels differ in bits."""

    kind: str = "adamw"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    momentum: float = 0.0
    implementation: str = "fused"
    sgd_momentum: float = 0.0
    """Of nodes that choose sgd in a session of another optimizer. Sessions recorded without it gave them ``momentum``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Learning rate over steps: ``warmup`` linear steps up to the peak, then a row of :data:`SCHEDULES`."""

    kind: str = "cosine"
    warmup: int = 0
    min_lr: float = 0.0
    """Where the rate would arrive after the last step. ``constant`` stays at the peak."""
    decay_share: float = 0.2
    """Of ``wsd``: the last steps, as a share of all, in which the rate falls."""


def AdamW(
    lr: float = 3e-4, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.01
) -> Optimizer:
    """Decoupled weight decay (Loshchilov and Hutter, 2019)."""
    return Optimizer(kind="adamw", lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def Adam(
    lr: float = 3e-4, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0
) -> Optimizer:
    """Kingma and Ba, 2015; weight decay as an L2 term, as in torch."""
    return Optimizer(kind="adam", lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def SGD(lr: float = 3e-4, momentum: float = 0.0, weight_decay: float = 0.0) -> Optimizer:
    return Optimizer(kind="sgd", lr=lr, momentum=momentum, weight_decay=weight_decay)


def Muon(
    lr: float = 3e-4,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Optimizer:
    """Jordan et al., 2024: orthogonalised momentum for the matrices of linear and attention, AdamW for the rest."""
    return Optimizer(kind="muon", lr=lr, momentum=momentum, weight_decay=weight_decay, betas=betas, eps=eps)


def Cosine(warmup: int = 0, min_lr: float = 0.0) -> Schedule:
    return Schedule(kind="cosine", warmup=warmup, min_lr=min_lr)


def Linear(warmup: int = 0, min_lr: float = 0.0) -> Schedule:
    return Schedule(kind="linear", warmup=warmup, min_lr=min_lr)


def WSD(warmup: int = 0, min_lr: float = 0.0, decay_share: float = 0.2) -> Schedule:
    """Warm-up, stable, decay (Hu et al., 2024): the peak, then a line down to ``min_lr`` in the last ``decay_share``
    of all steps. A fifth is what Hägele et al. (2024) find to do as well as a cosine over the whole run."""
    return Schedule(kind="wsd", warmup=warmup, min_lr=min_lr, decay_share=decay_share)


def Constant(warmup: int = 0) -> Schedule:
    return Schedule(kind="constant", warmup=warmup)


def _cosine(schedule: Schedule, peak: float, done: int, steps: int) -> float:
    share = (done - schedule.warmup) / max(1, steps - schedule.warmup)
    return schedule.min_lr + 0.5 * (peak - schedule.min_lr) * (1.0 + math.cos(math.pi * share))


def _linear(schedule: Schedule, peak: float, done: int, steps: int) -> float:
    return _line(schedule, peak, done, schedule.warmup, steps)


def _wsd(schedule: Schedule, peak: float, done: int, steps: int) -> float:
    first = max(schedule.warmup, steps - math.ceil(schedule.decay_share * steps))
    return peak if done < first else _line(schedule, peak, done, first, steps)


def _constant(schedule: Schedule, peak: float, done: int, steps: int) -> float:
    return peak


def _line(schedule: Schedule, peak: float, done: int, first: int, steps: int) -> float:
    """From ``peak`` where ``done`` is ``first``, towards ``min_lr`` where it is ``steps``."""
    return peak + (schedule.min_lr - peak) * ((done - first) / max(1, steps - first))


SCHEDULES: dict[str, Callable[[Schedule, float, int, int], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "wsd": _wsd,
    "constant": _constant,
}
"""The rate after the warm-up, of (schedule, peak, steps done, steps in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Steps are 1..``steps``; ``batch_size`` rows a step, in ``microbatches`` equal slices.

    ``clip_norm`` 0 = no clipping. ``delay`` is D of the version rule. ``checkpoint_every`` and ``eval_every`` 0 = never.
    A field that is added here has the default that sessions recorded without it had.
    """

    steps: int
    batch_size: int = 8
    microbatches: int = 4
    seed: int = 0
    mode: str = "exact"
    delay: int = 0
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    clip_norm: float = 1.0
    clip_scope: str = "network"
    """Whose gradient's norm is held to ``clip_norm``: all VNodes' together, or each VNode's own, known where it lives."""
    checkpoint_every: int = 20
    eval_every: int = 0
    eval_batches: int = 4

    def __post_init__(self) -> None:
        _expect_made("optimizer", self.optimizer, Optimizer, (AdamW, Adam, SGD, Muon))
        _expect_made("schedule", self.schedule, Schedule, (Cosine, Linear, WSD, Constant))
        counts = {
            "seed": (self.seed, None),
            "steps": (self.steps, None),
            "batch size": (self.batch_size, None),
            "microbatches": (self.microbatches, None),
            "delay": (self.delay, 0),
            "warmup": (self.schedule.warmup, 0),
            "checkpoint every": (self.checkpoint_every, 0),
            "eval every": (self.eval_every, 0),
            "eval batches": (self.eval_batches, 1),
        }
        for name, (count, least) in counts.items():
            # Of exactly this type: 2.0 and True would be other bytes of the same record.
            if type(count) is not int or (least is not None and count < least):
                expected = "a whole number" if least is None else f"a whole number of at least {least}"
                raise UsageError(f"{name} must be {expected}, found {_shown(count)}")
            most = SEED_MOST if name == "seed" else COUNT_MOST
            if abs(count) > most:
                raise UsageError(f"{name} must be at most {most}, found {_shown(count)}")
        if self.steps < 1 or self.batch_size < 1 or self.microbatches < 1:
            raise UsageError("steps, batch size and microbatches must be at least 1")
        if self.batch_size % self.microbatches:
            raise UsageError(
                f"batch size {self.batch_size} is not divisible by {self.microbatches} microbatches: "
                "every microbatch must have the same number of rows"
            )
        if self.optimizer.kind not in OPTIMIZERS:
            raise UsageError(f"unknown optimizer {self.optimizer.kind!r}: one of {', '.join(OPTIMIZERS)}")
        if self.optimizer.implementation not in IMPLEMENTATIONS:
            raise UsageError(
                f"unknown implementation {self.optimizer.implementation!r}: one of {', '.join(IMPLEMENTATIONS)}"
            )
        if self.schedule.kind not in tuple(SCHEDULES):
            raise UsageError(f"unknown schedule {self.schedule.kind!r}: one of {', '.join(SCHEDULES)}")
        if self.clip_scope not in CLIP_SCOPES:
            raise UsageError(f"unknown clip scope {self.clip_scope!r}: one of {', '.join(CLIP_SCOPES)}")
        betas = self.optimizer.betas
        if type(betas) is not tuple or len(betas) != 2:
            raise UsageError(f"betas must be two numbers, found {_shown(betas)}")
        numbers = {
            "lr": self.optimizer.lr,
            "weight decay": self.optimizer.weight_decay,
            "eps": self.optimizer.eps,
            "momentum": self.optimizer.momentum,
            "sgd momentum": self.optimizer.sgd_momentum,
            "min lr": self.schedule.min_lr,
            "clip norm": self.clip_norm,
            "the share of steps that decay": self.schedule.decay_share,
            "the first of betas": betas[0],
            "the second of betas": betas[1],
        }
        for name, value in numbers.items():
            if not _finite(value) or value < 0:
                raise UsageError(f"{name} must be a finite number of at least 0, found {_shown(value)}")
        if self.schedule.decay_share > 1:
            raise UsageError(f"the share of steps that decay must be from 0 to 1, found {self.schedule.decay_share}")
        for beta in betas:
            if beta >= 1:
                raise UsageError(f"betas must be at least 0 and below 1, found {beta}")
        # The largest product on the way to a rate: with it, every step's rate is finite.
        if not math.isfinite(float(self.optimizer.lr) * min(self.schedule.warmup, self.steps)):
            raise UsageError(
                f"lr must be smaller with a warmup of {self.schedule.warmup} steps, found {_shown(self.optimizer.lr)}"
            )

    @property
    def rows(self) -> int:
        """Rows of a microbatch."""
        return self.batch_size // self.microbatches

    def learning_rate(self, step: int) -> float:
        """Of step 1..T: a function of step - 1, so that a resumed session has the rate it would have had."""
        done, peak, schedule = step - 1, self.optimizer.lr, self.schedule
        if done < schedule.warmup:
            return peak * (done + 1) / schedule.warmup
        return SCHEDULES[schedule.kind](schedule, peak, done, self.steps)

    @property
    def clips_network(self) -> bool:
        """A step's update waits for the one factor that follows from all VNodes' gradients."""
        return self.clip_norm > 0 and self.clip_scope == "network"

    @property
    def clips_vnode(self) -> bool:
        """Every VNode has a factor of its own, from its own gradient alone."""
        return self.clip_norm > 0 and self.clip_scope == "vnode"

    def forward_version(self, step: int) -> int:
        """The version of the weights that forward and backward of ``step`` use: after step - 1 - D, or the initial ones."""
        return max(step - 1 - self.delay, 0)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Recipe:
        """Raises :class:`UsageError` on unknown keys or values out of range."""
        values = dict(data)
        try:
            optimizer = dict(values.pop("optimizer", {}))
            optimizer.setdefault("sgd_momentum", optimizer.get("momentum", 0.0))
            if "betas" in optimizer:
                optimizer["betas"] = tuple(optimizer["betas"])
            return Recipe(optimizer=Optimizer(**optimizer), schedule=Schedule(**values.pop("schedule", {})), **values)
        except (TypeError, ValueError) as error:
            raise UsageError(f"malformed recipe: {error}") from error

    @staticmethod
    def from_bytes(data: bytes) -> Recipe:
        try:
            return Recipe.from_json(json.loads(data))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(f"malformed recipe: {error}") from error


def _expect_made(what: str, found: object, kind: type, makers: Sequence[Callable[..., object]]) -> None:
    """Raises :class:`UsageError` with the function that was meant for a name (``"adamw"``) or the function itself."""
    if isinstance(found, kind):
        return
    names = {maker.__name__.lower(): f"dcnr.{maker.__name__}(...)" for maker in makers}
    word = found if isinstance(found, str) else getattr(found, "__name__", "")
    meant = nearest(word.lower(), tuple(names), "none").strip("'")
    expected = names.get(meant, f"one of {', '.join(names.values())}")
    raise UsageError(f"{what}: found {_shown(found)}, expected {expected}")


def _finite(value: object) -> bool:
    """An integer or a float (no bool, no text) that is finite as a float."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _shown(value: object) -> str:
    """A value in a message: a number may have any number of digits."""
    if type(value) is int and abs(value) > 10**40:
        return "a number of more than 40 digits"
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}.."


def grad_scale(grad_squares: list[float], clip_norm: float) -> float:
    """The factor of ``torch.nn.utils.clip_grad_norm_``: min(1, clip / (norm + 1e-6)).

    ``grad_squares`` in the order of ``nodes``, or one VNode's own; the left fold in float64 is part of the arithmetic.
    1.0 where ``clip_norm`` is 0.
    """
    total = 0.0
    for value in grad_squares:
        total += value
    return 1.0 if clip_norm == 0 else min(1.0, clip_norm / (math.sqrt(total) + 1e-6))


def root_mean_square(squares: Sequence[float], elements: int) -> float:
    """Of an activation over a step. ``squares``: sums of squares per microbatch, in order; ``elements`` of them all.

    A left fold in float64, as :func:`step_loss` is.
    """
    total = 0.0
    for square in squares:
        total += square
    return math.sqrt(total / elements)


def step_loss(losses: Sequence[Sequence[float]], weights: Sequence[float]) -> float:
    """The step's loss from the losses of each cost (its microbatches in order) and the costs' weights.

    Sum over costs, in the definition's order, of weight * the left fold over microbatches, in float64: part of the
    arithmetic, as :func:`grad_scale` is.
    """
    total = 0.0
    for microbatches, weight in zip(losses, weights, strict=True):
        mean = 0.0
        for loss in microbatches:
            mean += loss
        total += weight * mean
    return total
