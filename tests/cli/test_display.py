"""What a session looks like on a terminal and without one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from dcnr.cli.display import Meter, Teller, follow
from dcnr.cli.screen import PNodeRow, Screen, summarise
from dcnr.cli.story import Facts
from dcnr.cli.verify import Verdict
from dcnr.session.events import Evaluated, Finished, RecoveryPhase, Replaying, SessionEvent, StepDone, VNodeMoved, parse


def step(number: int, loss: float = 2.0) -> StepDone:
    return StepDone(step=number, loss=loss, learning_rate=0.1, grad_scale=1.0, tokens=100)


EVENTS: list[SessionEvent] = [
    step(1, 3.0),
    RecoveryPhase(phase="detected", ms=1012.5),
    Replaying(first=1, last=1),
    Evaluated(step=1, loss=2.5, rows=8),
    step(2, 1.5),
    Finished(step=2, loss=1.5),
]


def test_without_a_terminal_a_session_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    follow(EVENTS, 2, json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 1/2  loss 3.0000"
    assert lines[1] == "recovery: detected 1,012.5 ms"
    assert lines[2] == "replaying steps 1 to 1"
    assert lines[3] == "validation loss 2.5000 at step 1 (8 rows)"
    assert lines[4].startswith("step 2/2  loss 1.5000  validation 2.5000")
    assert lines[5] == "finished 2 steps, loss 1.5000"


def test_vnodes_that_move_together_are_one_line() -> None:
    def moved(vnode: str, target: str) -> VNodeMoved:
        return VNodeMoved(vnode=vnode, source="s" * 32, target=target * 32, index=4, why="half the work")

    teller = Teller()
    assert [teller.lines(moved(v, t)) for v, t in (("a", "t"), ("b", "u"), ("c", "t"))] == [[], [], []]
    assert teller.lines(Replaying(first=3, last=5)) == [
        "2 VNodes moved from ssssssss to tttttttt: half the work",
        "VNode b moved from ssssssss to uuuuuuuu: half the work",
        "replaying steps 3 to 5",
    ]
    assert teller.lines(step(6)) == []


def test_as_json_every_event_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    follow(EVENTS, 2, json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines] == [event.kind for event in EVENTS]
    assert lines[0]["loss"] == 3.0
    assert "metrics" not in lines[0]


def test_as_json_an_event_that_has_no_class_keeps_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    follow([parse("rebalancing", '{"gain_s": 12.5}'), EVENTS[-1]], 2, json=True)
    first, _ = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first == {"event": "rebalancing", "gain_s": 12.5}


def test_metrics_of_the_network_are_told_as_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    measured = replace(step(1), metrics={"head_norm": 0.25})
    follow([measured], 2, json=False)
    assert "head_norm" not in capsys.readouterr().out
    follow([measured], 2, json=True)
    line = json.loads(capsys.readouterr().out)
    assert line["metrics"] == {"head_norm": 0.25}
    assert parse(line["event"], json.dumps(line)) == measured


def test_on_a_terminal_there_is_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    follow(EVENTS, 2, json=False)
    out = capsys.readouterr().out
    assert "\x1b[" in out
    assert "recovery: detected 1,012.5 ms" in out


def test_vnodes_of_a_block_become_one_word() -> None:
    vnodes = ["embedder", "block_0_layernorm", "block_0_add", "block_10_add", "linear_0", "head"]
    assert summarise(vnodes) == "embedder block_0 (2) block_10 linear_0 head"


@pytest.mark.parametrize("columns", ["20", "60", "200"])
def test_the_live_screen_fits_any_width(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import re

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", columns)
    meter = Meter(100)
    rows = [
        PNodeRow(number=1, peer="p", pid=11, vnodes=[f"block_{n}_add" for n in range(40)], segments=2),
        PNodeRow(number=2, peer="q", pid=12, state="dead"),
    ]
    with Screen(meter, rows) as screen:
        meter.take(step(7))
        screen.line("something happened")
    out = capsys.readouterr().out
    assert "something happened" in out
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)
    assert max(len(line) for line in plain.replace("\r", "\n").splitlines()) <= int(columns)


def verdict(equal: bool) -> Verdict:
    return Verdict(
        session="s",
        base_step=0,
        last_step=1,
        commits=(1,),
        equal=equal,
        sha256_network="a",
        sha256_recomputed="a",
        differences=(),
    )


def test_the_demos_promises_are_judged_by_what_happened() -> None:
    facts = Facts(losses={n: 5.0 - n / 10 for n in range(1, 31)})
    assert facts.loss_fell
    facts.validations = [(10, 3.0), (20, 3.5)]
    assert not facts.loss_fell
    assert not Facts(losses=dict.fromkeys(range(1, 31), 5.0)).loss_fell
    assert not Facts().loss_fell

    facts = Facts(finished=True, placed_again=True)
    assert not facts.survived
    facts.killed = 2
    assert facts.survived
    facts.finished = False
    assert not facts.survived

    assert not Facts().equal
    assert not Facts(verdict=verdict(False)).equal
    assert Facts(verdict=verdict(True)).equal
