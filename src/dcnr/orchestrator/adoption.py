"""Taking over a session that goes on: what its hosts say, put together to where it stands.

Nothing that hosts have computed is lost by the change of an owner: they keep every report that it may need, say them
again, and then say what the reports alone do not show.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dcnr.ids import Instance, PeerId
from dcnr.machine import Instant
from dcnr.orchestrator.step import StepMachine
from dcnr.protocol import messages as m


@dataclass(slots=True, kw_only=True)
class Adoption:
    """Hosts that are asked, and what they have said. ``until``: whoever has not answered by then is lost."""

    waiting: set[PeerId]
    until: Instant
    answers: dict[PeerId, m.Adopted] = field(default_factory=dict)
    reports: list[tuple[PeerId, m.Message]] = field(default_factory=list)
    """In the order in which they came; each at least once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where the hosts stand together."""

    done_step: int
    """Every report of later steps has been said again."""
    last_opened: tuple[int, int] | None
    """(step, microbatch); those before it were opened too."""
    losses: Mapping[int, float]
    """Of the steps since the newest commit, up to ``done_step``."""
    scales: Mapping[int, float]
    snapshot_at: int
    """The snapshot that every host plans or has stored; 0 = none."""


def untouched(answers: Mapping[PeerId, m.Adopted], instance: Instance, base_step: int) -> bool:
    """Whether none of the hosts that have their tickets has begun: then the others may still get theirs."""
    here = [a for a in answers.values() if a.instance == instance]
    return all(not a.open_microbatches and all(v == base_step for _, v in a.versions) for a in here)


def standing(
    adoption: Adoption, steps: StepMachine, committed_step: int, stateful: frozenset[PeerId]
) -> Standing | None:
    """``steps`` knows the session's costs. ``None`` where something is missing: then it goes back to its newest commit.

    ``stateful``: hosts of VNodes with parameters.
    """
    answers = adoption.answers
    done = max(committed_step, max(a.kept_from for a in answers.values()) - 1)
    if any(version < done for a in answers.values() for _, version in a.versions):
        return None
    said = [message for _, message in adoption.reports if isinstance(message, m.Loss)]
    losses = {step: steps.loss_of(step, said) for step in range(committed_step + 1, done + 1)}
    known = {step: loss for step, loss in losses.items() if loss is not None}
    if len(known) < len(losses):
        return None
    opened = [key for a in answers.values() for key in a.open_microbatches if key[0] > done]
    planned = {answers[peer].snapshot_at for peer in stateful}
    return Standing(
        done_step=done,
        last_opened=max(opened, default=None),
        losses=known,
        scales={step: scale for a in answers.values() for step, scale in a.scales},
        snapshot_at=planned.pop() if len(planned) == 1 else 0,
    )
