"""Which steps are recomputed, and when they cannot be compared."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from dcnr.cli.verify import begun_before, classes_of, combined, plan
from dcnr.errors import NotFound, UsageError
from dcnr.ids import Epoch, Incarnation, LogIndex, PeerId
from dcnr.session.log import Author, Entry, Kind


def placed(index: int, base: int, classes: Mapping[str, str], kind: Kind = Kind.ROLLBACK) -> Entry:
    spots = {vnode: ["p" * 32, 1, "n" * 32, 0, numeric_class] for vnode, numeric_class in classes.items()}
    return Entry(
        index=LogIndex(index),
        kind=kind,
        author=Author(peer=PeerId("o" * 32), incarnation=Incarnation(boot=1, nonce="0" * 32)),
        epoch=Epoch(1),
        nonce=str(index),
        body={"folded": {"base": [base, None], "placement": spots}},
    )


ONE = [placed(2, 0, {"a": "x", "b": "x"}, Kind.PLACE)]


@pytest.mark.parametrize(
    ("first", "last", "base", "compared"),
    [
        (0, None, 0, (10, 20, 30)),
        (0, 10, 0, (10,)),
        (10, 30, 10, (20, 30)),
        (12, 13, 10, (20,)),
        (15, 25, 10, (20, 30)),
        (20, 20, 10, (20,)),
        (30, 30, 20, (30,)),
        (3, 4, 0, (10,)),
    ],
)
def test_the_range_is_rounded_outward_to_commits(
    first: int, last: int | None, base: int, compared: tuple[int, ...]
) -> None:
    planned = plan(ONE, [30, 10, 20], first, last)
    assert (planned.base_step, planned.commits, planned.numeric_class) == (base, compared, "x")


def test_what_has_no_commit_cannot_be_verified() -> None:
    with pytest.raises(NotFound, match="no commit yet"):
        plan(ONE, [], 0, None)
    with pytest.raises(NotFound, match="newest is of step 20"):
        plan(ONE, [10, 20], 0, 21)
    with pytest.raises(NotFound, match="no commit at or after step 500: the newest is of step 20"):
        plan(ONE, [10, 20], 500, None)
    with pytest.raises(UsageError, match="--from 5 is after --to 4"):
        plan(ONE, [10], 5, 4)


@pytest.mark.parametrize(
    ("first", "base", "said"),
    [
        (0, 0, ""),
        (1, 0, ""),
        (11, 10, ""),
        (10, 10, ""),
        (15, 10, "from the commit of step 10 on, the newest before step 15 that is kept"),
        (9, 0, "from the initial weights on: no commit before step 9 is kept"),
    ],
)
def test_whoever_asks_for_little_is_told_why_more_is_computed(first: int, base: int, said: str) -> None:
    assert begun_before(base, first) == said


def test_two_classes_in_one_range_are_refused_by_name() -> None:
    entries = [*ONE, placed(5, 10, {"a": "x", "b": "y"})]
    assert plan(entries, [10, 20], 0, 10).numeric_class == "x"
    with pytest.raises(UsageError, match=r"steps 1 to 20 .*x, y"):
        plan(entries, [10, 20], 0, 20)
    with pytest.raises(UsageError, match=r"steps 11 to 20"):
        plan(entries, [10, 20], 10, 20)


def test_a_placement_whose_steps_were_all_rolled_back_does_not_count() -> None:
    # y computed 11..17, was lost, and x computed them again from 10: nothing of y is left.
    entries = [*ONE, placed(5, 10, {"a": "y"}), placed(7, 10, {"a": "x"})]
    assert classes_of(entries, 0, 20) == {"x"}
    # A later rollback behind it takes the steps of an earlier placement away too.
    entries = [*ONE, placed(5, 10, {"a": "y"}), placed(7, 5, {"a": "z"})]
    assert classes_of(entries, 0, 20) == {"x", "z"}
    assert classes_of(entries, 0, 5) == {"x"}


def test_the_hash_covers_step_vnode_and_state() -> None:
    states = {1: {"a": "1", "b": "2"}}
    assert combined(states) == combined({1: {"b": "2", "a": "1"}})
    others = [{1: {"a": "2", "b": "1"}}, {2: {"a": "1", "b": "2"}}, {1: {"a": "1"}}]
    assert len({combined(states), *(combined(o) for o in others)}) == 4


def test_another_class_is_no_difference(tmp_path: Path) -> None:
    """What another processor or torch would compute says nothing about the steps: nothing is compared."""
    (tmp_path / "request.json").write_text(json.dumps({"threads": 1, "numeric_class": "0" * 64}))
    done = subprocess.run(
        [sys.executable, "-m", "dcnr.cli.verify_child", str(tmp_path)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "by class 00000000: nothing was compared" in done.stderr
    assert done.stderr.count("\n") == 1
