"""Dialling: quickly at first, never for longer than an orchestrator's grace, and at once after a break."""

from __future__ import annotations

from dcnr.config import LIMITS
from dcnr.machine import Dial, LinkDown, LinkUp, Send
from dcnr.protocol import messages as m
from tests.pnode.lab import ADDRESS, BOOT, ORCHESTRATOR, OTHER, Lab


def pauses_after_a_break(lab: Lab, tries: int) -> list[float]:
    """Seconds before each dial, when every dial fails at once."""
    lab.take(Dial)
    lab.do(LinkDown(peer=ORCHESTRATOR, reason="reset"))
    pauses, last = [], lab.now
    for _ in range(tries):
        while not (dials := lab.take(Dial)):
            deadline = lab.machine.deadline()
            assert deadline is not None
            lab.wait(max(deadline - lab.now, 0.0))
        assert [d.addresses for d in dials] == [(ADDRESS,)]
        pauses.append(lab.now - last)
        last = lab.now
        lab.do(LinkDown(peer=dials[0].peer, reason="refused", address=dials[0].addresses[0]))
    return pauses


def test_a_broken_link_is_dialled_at_once_and_three_times_more_within_the_grace() -> None:
    lab = Lab()
    lab.link()
    pauses = pauses_after_a_break(lab, 20)
    assert pauses[0] == 0.0
    for pause, most in zip(pauses[1:4], (0.1, 0.2, 0.4), strict=True):
        assert most / 2 <= pause <= most + 0.001
    assert sum(pauses[:4]) < LIMITS.link_grace_s


def test_a_dial_is_never_further_away_than_the_grace_less_a_handshake() -> None:
    handshake_s = 0.3
    assert LIMITS.redial_most_s + handshake_s < LIMITS.link_grace_s
    lab = Lab()
    lab.link()
    pauses = pauses_after_a_break(lab, 20)
    assert max(pauses) <= LIMITS.redial_most_s + 0.001
    assert min(pauses[4:]) >= LIMITS.redial_most_s / 2, "failures that last are met with patience"


def test_the_pauses_begin_anew_after_a_link() -> None:
    lab = Lab()
    lab.link()
    pauses_after_a_break(lab, 10)
    lab.wait(LIMITS.redial_most_s)
    assert lab.take(Dial)
    lab.link()
    assert pauses_after_a_break(lab, 2)[1] <= 0.101


def test_two_pnodes_that_start_together_do_not_dial_in_step() -> None:
    first, second = Lab(), Lab()
    second.machine._seed = 1
    for lab in (first, second):
        lab.link()
    assert pauses_after_a_break(first, 6) != pauses_after_a_break(second, 6)


def test_a_new_link_is_told_at_once_that_it_lives() -> None:
    lab = Lab()
    lab.said(m.Heartbeat)
    lab.link()
    assert len(lab.said(m.Heartbeat)) == 1


def test_a_peer_is_dialled_only_while_a_frame_waits_for_it() -> None:
    lab = Lab()
    lab.link()
    lab.accept()
    lab.take(Dial)
    lab.wait(3.0)
    assert not lab.take(Dial)
    lab.open()
    lab.receive(lab.frame())
    lab.work()
    assert [d.peer for d in lab.take(Dial)] == [OTHER]
    lab.do(LinkDown(peer=OTHER, reason="refused"))
    lab.wait(0.2)
    assert [d.peer for d in lab.take(Dial)] == [OTHER]
    lab.out = [effect for effect in lab.out if not isinstance(effect, Send)]
    lab.do(LinkUp(peer=OTHER, incarnation=BOOT[OTHER], role="pnode", address="a"))
    assert len(lab.said(m.TensorFrame, OTHER)) == 1
    lab.wait(3.0)
    assert not lab.take(Dial)
