"""The lines of `dcnr bench recovery`: what they are made of, and that real deaths fill them."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dcnr.cli import bench_recovery
from dcnr.cli.bench_recovery import Following, Loss, behead, checkpoints, lose, regains, start, succession, withdrawn
from dcnr.cli.main import app
from dcnr.ids import Epoch, Incarnation, LogIndex, PeerId
from dcnr.network import templates
from dcnr.runtime.supervisor import LocalNetwork
from dcnr.session.log import Author, Entry, Kind
from dcnr.wiring import connect

FIELDS = {"bench", "figure", "value", "unit", "against", "goal", "holds", "samples"}


def a_loss(regain_s: float) -> Loss:
    return Loss(
        regain_s=regain_s, step_s=0.25, idle_s=regain_s - 0.1, steps_after_commit=3, phases_ms={"detected": 1.0}
    )


def test_a_regain_may_take_three_seconds_and_two_steps() -> None:
    for slowest, holds in ((3.5, True), (3.6, False)):
        regain, lost = regains([a_loss(1.0), a_loss(slowest), a_loss(9.0)])
        assert set(regain) == set(lost) == FIELDS
        assert (regain["bench"], regain["value"], regain["goal"], regain["holds"]) == ("recovery", slowest, 3.5, holds)
        assert [part["regain_s"] for part in regain["samples"]["losses"]] == [1.0, slowest, 9.0]
        assert lost["value"] == pytest.approx(bench_recovery.PNODES * (slowest - 0.1))
        assert lost["holds"] is None


def entry(kind: Kind, base: int = 0) -> Entry:
    author = Author(peer=PeerId("o" * 32), incarnation=Incarnation(boot=1, nonce="0" * 32))
    body = {"folded": {"base": [base, None]}}
    return Entry(index=LogIndex(1), kind=kind, author=author, epoch=Epoch(1), nonce="n", body=body)


def test_what_a_rollback_computes_again_was_withdrawn() -> None:
    assert withdrawn([entry(Kind.ACQUIRE), entry(Kind.COMMIT)], 33) == 0
    assert withdrawn([entry(Kind.ACQUIRE), entry(Kind.ROLLBACK, 20), entry(Kind.ROLLBACK, 30)], 33) == 13


def test_a_succession_that_withdraws_a_step_misses_its_goal() -> None:
    assert succession([(1.0, 0), (3.9, 0), (9.0, 0)])["holds"] is True
    assert succession([(1.0, 0), (4.1, 0), (9.0, 0)])["holds"] is False
    assert succession([(1.0, 0), (3.9, 1), (9.0, 0)])["holds"] is False


def test_only_recovery_has_a_long_form() -> None:
    for option, more in (("--full", []), ("--store", ["s3://bucket"])):
        result = CliRunner().invoke(app, ["bench", "placement", option, *more])
        assert (result.exit_code, result.stderr) == (
            2,
            f"error: {option} is for the benchmark recovery, found 'placement'\n",
        )


@pytest.mark.timeout(400)
def test_real_deaths_and_a_real_checkpoint_are_measured(tmp_path: Path) -> None:
    model = templates.gpt(layers=2, dim=32, heads=2, vocab=256, context=16)
    with LocalNetwork(tmp_path, 2, 1, orchestrators=2) as local, connect(local.address) as net:
        following = Following(start(net, model, steps=10**6))
        before = [child.pid for child in local.pnodes]
        loss = lose(local, following, 6)
        assert sum(a != b.pid for a, b in zip(before, local.pnodes, strict=True)) == 1
        assert list(loss.phases_ms) == ["detected", "decided", "logged", "ticketed", "loaded", "regained"]
        assert loss.regain_s > loss.step_s > 0
        assert loss.steps_after_commit % bench_recovery.CHECKPOINT_EVERY == 6
        owners = [child.pid for child in local.orchestrators]
        seconds, steps = behead(local, following)
        assert seconds > 0
        assert steps == 0
        assert sum(a != b.pid for a, b in zip(owners, local.orchestrators, strict=True)) == 1
        following.run.stop()
        speed, size = checkpoints(net, model, str(tmp_path / "bare"), 1)
    assert set(speed) == FIELDS
    assert speed["value"] == round(speed["samples"]["network"][0] / speed["samples"]["baseline"][0], 4)
    assert 1.0 <= size["value"] < 1.5
