"""What faults did to a session: how long each regain took, whether a step was lost, and the judgement."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dcnr.cli.chaos_plan import Fault
from dcnr.session.events import Finished, Placed, SessionEvent, StepDone

if TYPE_CHECKING:
    from dcnr.cli.verify import Verdict

ON_ITS_WAY_S = 0.1
"""A step that is heard within this time after a fault was done before it, and only the news was late."""
COLUMNS = ("at", "fault", "process", "step", "next step", "regained", "remark")


@dataclass(slots=True, kw_only=True)
class Row:
    """A fault and what followed. Times in seconds."""

    fault: Fault
    name: str
    """Of the process, as `dcnr up` calls it."""
    at_s: float
    """Since the beginning, as it was done."""
    done_before: int
    """The newest step that was done by then."""
    skipped: str = ""
    """Why nothing was done."""
    idle: bool = False
    """Whether it was a PNode that hosted nothing of the session."""
    next_step_s: float | None = None
    """From the fault until a step beyond those was done."""
    regain_s: float | None = None
    """From the fault until the step that was running when the network took notice was done; ``next_step_s`` where it
    placed nothing anew."""
    lost_step: int = -1
    """The newest step that was done when VNodes were placed anew, as far as we were told: -1 where we were not, also
    because the orchestrator that would have told us was the victim."""

    @property
    def remark(self) -> str:
        if self.idle and self.lost_step < 0:
            return "idle"
        return self.skipped or ("placed anew" if self.lost_step >= 0 else "")

    def to_json(self) -> dict[str, Any]:
        return {
            "fault": self.fault.kind,
            "process": self.name,
            "at_s": round(self.at_s, 3),
            "lasts_s": self.fault.lasts_s,
            "done_before": self.done_before,
            "next_step_s": self.next_step_s,
            "regain_s": self.regain_s,
            "placed_anew": self.lost_step >= 0,
            "idle": self.idle,
            "skipped": self.skipped,
        }


@dataclass(slots=True, kw_only=True)
class Report:
    """Events and faults go in with their times, in order; the judgement comes out."""

    step: int
    """The newest step that is done; at first that at which the watching begins."""
    rows: list[Row] = field(default_factory=list)
    lost_steps: list[int] = field(default_factory=list)
    """Steps whose StepDone never came."""
    verdicts: list[Verdict] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Whatever else must not be."""
    finished: bool = False

    def add(self, row: Row) -> None:
        self.rows.append(row)

    @property
    def done(self) -> list[Row]:
        """Of faults that were not skipped."""
        return [row for row in self.rows if not row.skipped]

    def take(self, now_s: float, event: SessionEvent) -> list[Row]:
        """An event of the session, ``now_s`` seconds after the beginning; rows whose regain it is."""
        regained = []
        match event:
            case StepDone():
                self.lost_steps += range(self.step + 1, event.step)
                self.step = max(self.step, event.step)
                for row in self.done:
                    if now_s - row.at_s < ON_ITS_WAY_S:
                        row.done_before = self.step
                    if event.step > row.done_before and row.next_step_s is None:
                        row.next_step_s = round(now_s - row.at_s, 3)
                    if event.step > max(row.done_before, row.lost_step) and row.regain_s is None:
                        row.regain_s = round(now_s - row.at_s, 3)
                        regained.append(row)
            case Placed() if self.done:
                # The newest fault is the likeliest cause; earlier ones that wait for their step go on waiting.
                row = self.done[-1]
                row.lost_step, row.regain_s = self.step, None
            case Finished():
                self.finished = True
            case _:
                pass
        return regained

    @property
    def waiting(self) -> bool:
        """Whether some fault's step is still to come."""
        return any(row.regain_s is None for row in self.done)

    @property
    def went_on(self) -> bool:
        return self.finished or not self.waiting

    def complaints(self) -> Iterator[str]:
        """Why the judgement is no, one line each."""
        yield from self.problems
        if not self.done:
            yield "no fault was done, so nothing was shown"
        if not self.went_on:
            last = next(row for row in self.done if row.regain_s is None)
            yield f"the session did not go on after {last.fault.kind} of {last.name} at {last.at_s:.1f} s"
        if self.lost_steps:
            yield f"steps were lost: {', '.join(map(str, self.lost_steps[:20]))}"
        if not self.verdicts:
            yield "no steps were recomputed, so no bit was compared"
        for verdict in self.verdicts:
            if not verdict.equal:
                yield (
                    f"steps {verdict.base_step + 1} to {verdict.last_step} differ from their recomputation: "
                    + "; ".join(verdict.differences[:3])
                )

    def table(self) -> Iterator[tuple[str, ...]]:
        """Rows of :data:`COLUMNS`."""
        for row in self.rows:
            lasts = f" {row.fault.lasts_s:.0f} s" if row.fault.lasts_s else ""
            yield (
                f"{row.at_s:.1f} s", row.fault.kind + lasts, row.name, str(row.done_before),
                seconds(row.next_step_s), seconds(row.regain_s), row.remark,
            )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        complaints = list(self.complaints())
        return {
            "faults": [row.to_json() for row in self.rows],
            "step": self.step,
            "went_on": self.went_on,
            "lost_steps": self.lost_steps,
            "windows": [
                {"first": v.base_step + 1, "last": v.last_step, "equal": v.equal, "sha256": v.sha256_network}
                for v in self.verdicts
            ],
            "holds": not complaints,
            "complaints": complaints,
        }


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"
