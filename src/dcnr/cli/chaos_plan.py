"""What `dcnr chaos` will do, and when: a pure function of the seed, so that a run can be had again."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dcnr.errors import UsageError

KINDS = {
    "kill": "SIGKILL; `dcnr up` starts it again a second later",
    "stop": "SIGSTOP, and SIGCONT some seconds later, after the network's patience or before it",
    "restart": "SIGTERM; it says goodbye, and `dcnr up` starts it again at once",
    "partition": "nobody hears it and it hears nobody, for as long as a stop; it goes on computing meanwhile",
}
LASTING = ("stop", "partition")
SHORT_STOP_S = (0.5, 4.0)
LONG_STOP_S = (6.0, 15.0)
"""Either side of the 5 s after which a silent PNode is lost."""
UNITS_S = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """``kind``, one of :data:`KINDS`, befalls process ``victim`` ``at_s`` seconds after the beginning."""

    at_s: float
    kind: str
    victim: int
    """A PNode by its number; the number after those is the orchestrator that owns the session by then."""
    lasts_s: float
    """Until it is undone; 0 for what ends by itself."""

    @property
    def what(self) -> str:
        """As ``stop for 6.3 s``."""
        return self.kind + (f" for {self.lasts_s:.1f} s" if self.lasts_s else "")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def faults(seed: int, *, for_s: float, every_s: float, kinds: Sequence[str], victims: int) -> tuple[Fault, ...]:
    """On average one every ``every_s`` seconds, for ``for_s`` seconds; gaps are half of that to one and a half."""
    draw = random.Random(seed).random  # The one function whose values no version of Python changes.
    planned: list[Fault] = []
    at_s = 0.0
    while True:
        # All of them every time, so that other kinds leave times and victims as they are.
        gap, kind, victim, long, part = draw(), draw(), draw(), draw(), draw()
        at_s += every_s * (0.5 + gap)
        if at_s >= for_s:
            return tuple(planned)
        chosen = kinds[int(kind * len(kinds))]
        least_s, most_s = LONG_STOP_S if long < 0.5 else SHORT_STOP_S
        lasts_s = least_s + part * (most_s - least_s) if chosen in LASTING else 0.0
        planned.append(Fault(at_s=round(at_s, 2), kind=chosen, victim=int(victim * victims), lasts_s=round(lasts_s, 2)))


def windows(seed: int, *, for_s: float, count: int) -> tuple[float, ...]:
    """Times, ascending: what the first commit after each of them closes is verified at the end."""
    draw = random.Random(~seed).random
    return tuple(sorted(round(for_s * draw(), 2) for _ in range(count)))


def parse_duration(option: str, text: str) -> float:
    """``90``, ``20s``, ``5m``, ``1h``: seconds, more than 0. Raises :class:`UsageError`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", text.lower())
    seconds = float(found[1]) * UNITS_S[found[2]] if found else 0.0
    if not seconds > 0:
        raise UsageError(f"{option} takes a duration, as 20s, 5m or 1h, found {text!r}")
    return seconds


def parse_kinds(text: str | None, *, cuttable: bool) -> tuple[str, ...]:
    """Kinds of faults, separated by commas; ``None``: all that this network allows. Raises :class:`UsageError`."""
    if text is None:
        return tuple(kind for kind in KINDS if cuttable or kind != "partition")
    kinds = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise UsageError(f"--faults takes some of {', '.join(KINDS)}, found {text!r}")
    if "partition" in kinds and not cuttable:
        raise UsageError(
            "--faults partition needs a network that was started with `dcnr up --cuttable`: the processes of this one "
            "reach each other directly, and nothing stands between them that could hold back what they say"
        )
    return kinds
