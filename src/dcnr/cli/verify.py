"""``dcnr session verify``: steps of a session recomputed in one process, and compared bit by bit.

Three parts: a pure choice of commits (:func:`plan`), the collection of what the network says (:func:`collect`), and
the recomputation in a child process (:func:`recompute`), because the number of threads must stand before torch is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcnr.errors import ComputeError, NotFound, UsageError
from dcnr.session.log import PLACING, Entry, Spot

if TYPE_CHECKING:
    from dcnr.client.blocking import Client, Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Recompute from the commit of ``base_step`` (0 = init) and compare at ``commits``, the last of which ends it."""

    base_step: int
    commits: tuple[int, ...]
    numeric_class: str


def plan(entries: Iterable[Entry], commits: Iterable[int], first: int, last: int | None) -> Plan:
    """Round the range first..last outward to commits.

    Raises :class:`NotFound` where no commit closes the range, and :class:`UsageError` where the range was computed by
    machines of several numeric classes: their bits may differ, so there is nothing to compare.
    """
    steps = sorted(commits)
    if not steps:
        raise NotFound("the session has no commit yet, so there is nothing to verify")
    if last is not None and first > last:
        raise UsageError(f"--from {first} is after --to {last}")
    wanted = max(first, steps[-1]) if last is None else last
    if wanted > steps[-1]:
        raise NotFound(f"no commit at or after step {wanted}: the newest is of step {steps[-1]}")
    end = next(step for step in steps if step >= wanted)
    base = max((step for step in steps if step <= first and step < end), default=0)
    classes = classes_of(entries, base, end)
    if len(classes) > 1:
        raise UsageError(
            f"steps {base + 1} to {end} were computed by several numeric classes ({', '.join(sorted(classes))}): "
            "choose a range within one"
        )
    if not classes:
        raise NotFound("the session was never placed")
    return Plan(base_step=base, commits=tuple(s for s in steps if base < s <= end), numeric_class=next(iter(classes)))


def begun_before(base_step: int, first: int) -> str:
    """Why more is recomputed than was asked for; '' = it is not, at the beginning of the range."""
    if base_step + 1 >= first:
        return ""
    if base_step == 0:
        return f"from the initial weights on: no commit before step {first} is kept"
    return f"from the commit of step {base_step} on, the newest before step {first} that is kept"


def classes_of(entries: Iterable[Entry], base: int, end: int) -> frozenset[str]:
    """Numeric classes that computed the steps base+1..end for good.

    A placement from step b computes b+1 and on, until the next one, from step c, computes c+1 and on again.
    """
    found: set[str] = set()
    placements = [entry for entry in entries if entry.kind in PLACING]
    starts = [int(entry.body["folded"]["base"][0]) for entry in placements]
    for position, entry in enumerate(placements):
        begins = starts[position]
        ends = min([end, *starts[position + 1 :]])
        if max(begins, base) < ends:
            found |= {Spot.from_json(spot).numeric_class for spot in entry.body["folded"]["placement"].values()}
    return frozenset(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What the network says: enough, with the dataset's rows, to recompute the steps. ``base_objects`` are bytes."""

    session: str
    record: bytes
    definition: bytes
    numeric_class: str
    """That computed the steps; another one would compute other bits."""
    threads: int
    base_step: int
    base_objects: Mapping[str, bytes]
    """VNode to state object; where ``base_step`` is 0 those that the session began with, if it did not begin anew."""
    states: Mapping[int, Mapping[str, str]]
    """Step of a commit to VNode to sha256."""
    losses: Mapping[int, float]

    @property
    def last_step(self) -> int:
        return max(self.states)


def collect(net: Client, run: Run, first: int = 0, last: int | None = None) -> Evidence:
    """Ask the network for record, log, commits and the base's states. Raises as :func:`plan` does."""
    files = run.files()
    planned = plan((Entry.from_bytes(e) for e in files.entries), (c.step for c in files.commits), first, last)
    manifests = {step: run.manifest(files, step) for step in planned.commits}
    base_objects: dict[str, bytes] = {}
    base = run.manifest(files, planned.base_step) if planned.base_step else run.initial(files)
    if base is not None:
        base_objects = {vnode: run.state_object(files, base, vnode) for vnode in base.states}
    losses = {
        step: loss
        for manifest in manifests.values()
        for step, loss in manifest.losses
        if planned.base_step < step <= planned.commits[-1]
    }
    return Evidence(
        session=files.session,
        record=files.record,
        definition=files.definition,
        numeric_class=planned.numeric_class,
        threads=_threads_of(net, planned.numeric_class),
        base_step=planned.base_step,
        base_objects=base_objects,
        states={
            step: {vnode: stored.sha256 for vnode, stored in manifest.states.items()}
            for step, manifest in manifests.items()
        },
        losses=losses,
    )


def _threads_of(net: Client, numeric_class: str) -> int:
    """Threads per worker of a class; 1, the default of a PNode, where none of its machines is here any more."""
    return next((n.capabilities.threads for n in net.nodes() if n.capabilities.numeric_class == numeric_class), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Both hashes cover every VNode's state object at every commit of the range."""

    session: str
    base_step: int
    last_step: int
    commits: tuple[int, ...]
    equal: bool
    sha256_network: str
    sha256_recomputed: str
    differences: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def combined(states: Mapping[int, Mapping[str, str]]) -> str:
    """One sha256 over lines of step, VNode and sha256, sorted."""
    lines = [f"{step} {vnode} {sha256}\n" for step in sorted(states) for vnode, sha256 in sorted(states[step].items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def recompute(address: str, evidence: Evidence, told: Callable[[int, bool], None] | None = None) -> Verdict:
    """Compute the steps in a child process with the class's environment and compare.

    ``told`` hears (step, loss is equal) as steps are done. Raises :class:`ComputeError` where the child fails.
    """
    differences: list[str] = []
    states: dict[int, dict[str, str]] = {}
    for line in _child(address, evidence):
        match line:
            case {"step": step, "loss": loss}:
                expected = evidence.losses.get(step)
                equal = expected is None or expected == loss
                if not equal:
                    differences.append(f"step {step}: the network's loss is {expected!r}, recomputed {loss!r}")
                if told is not None:
                    told(step, equal)
            case {"commit": step, "states": found}:
                states[step] = found
            case _:
                raise ComputeError(f"the recomputing process said {line!r}")
    for step, expected_states in evidence.states.items():
        for vnode, sha256 in expected_states.items():
            here = states.get(step, {}).get(vnode)
            if here != sha256:
                differences.append(f"step {step}, VNode {vnode}: the network has {sha256}, recomputed {here}")
    ours = {step: {v: s for v, s in found.items() if v in evidence.states[step]} for step, found in states.items()}
    return Verdict(
        session=evidence.session,
        base_step=evidence.base_step,
        last_step=evidence.last_step,
        commits=tuple(sorted(evidence.states)),
        equal=not differences,
        sha256_network=combined(evidence.states),
        sha256_recomputed=combined(ours),
        differences=tuple(differences),
    )


def _child(address: str, evidence: Evidence) -> Iterable[Any]:
    """Run :mod:`dcnr.cli.verify_child` and give its JSON lines as they come."""
    with tempfile.TemporaryDirectory(prefix="dcnr-verify-") as name:
        folder = Path(name)
        (folder / "record.json").write_bytes(evidence.record)
        (folder / "definition.json").write_bytes(evidence.definition)
        for vnode, data in evidence.base_objects.items():
            (folder / f"{hashlib.sha256(vnode.encode()).hexdigest()}.safetensors").write_bytes(data)
        (folder / "request.json").write_text(
            json.dumps(
                {
                    "address": address,
                    "session": evidence.session,
                    "threads": evidence.threads,
                    "numeric_class": evidence.numeric_class,
                    "base_step": evidence.base_step,
                    "base_vnodes": list(evidence.base_objects),
                    "commits": sorted(evidence.states),
                }
            )
        )
        environment = os.environ | {
            "OMP_NUM_THREADS": str(evidence.threads),
            "MKL_NUM_THREADS": str(evidence.threads),
            "OMP_DYNAMIC": "FALSE",
            "MKL_DYNAMIC": "FALSE",
        }
        complaints = folder / "stderr"
        with complaints.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "dcnr.cli.verify_child", name],
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment,
                text=True,
            )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                yield json.loads(line)
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        if code != 0:
            last = complaints.read_text(errors="replace").strip().splitlines()[-1:]
            raise ComputeError(f"recomputing failed: {last[0] if last else f'exit {code}'}")
