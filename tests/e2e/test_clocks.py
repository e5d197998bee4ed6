"""Wall clocks that are a month off: nothing waits and nothing dies, and ``dcnr doctor`` names it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import dcnr
from dcnr.runtime.supervisor import LocalNetwork
from tests.e2e.test_exact import assert_equals_oracle, text_like_columns, train

MONTH_S = 30 * 86400
STEPS = 40
KILL_AT = 7

# Python runs it before anything else, in every process whose PYTHONPATH has it.
OFF = """
import os, time
if off_s := float(os.environ.get("CLOCK_OFF_S", "0")):
    real_s, real_ns = time.time, time.time_ns
    time.time = lambda: real_s() + off_s
    time.time_ns = lambda: real_ns() + int(off_s * 1e9)
"""


def doctor(address: str) -> dict[str, Any]:
    words = [sys.executable, "-m", "dcnr.cli.main", "doctor", "--network", address, "--json"]
    found = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert found.returncode == 0, found.stderr
    return next(check for check in map(json.loads, found.stdout.splitlines()) if check["check"] == "clock")


@pytest.mark.timeout(300)
def test_orchestrators_and_a_pnode_whose_clocks_are_a_month_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One orchestrator a month ahead owns the session and is killed, one a month behind takes it over; one PNode's clock
    is ahead, the other's is right, as is the client's."""
    (tmp_path / "sitecustomize.py").write_text(OFF)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    columns, store = text_like_columns(), str(tmp_path / "store")
    monkeypatch.setenv("CLOCK_OFF_S", str(MONTH_S))
    with LocalNetwork(tmp_path / "ahead", 1, store=store) as ahead:
        monkeypatch.setenv("CLOCK_OFF_S", str(-MONTH_S))
        with LocalNetwork(tmp_path / "behind", 0, store=store) as behind:
            monkeypatch.delenv("CLOCK_OFF_S")
            ahead.start_pnode()
            first, second = doctor(ahead.address), doctor(behind.address)
            assert not first["ok"]
            assert not second["ok"]
            assert "behind the orchestrator's" in first["found"]
            assert "ahead of the orchestrator's" in second["found"]
            for check in (first, second):
                assert "30 d 0 h" in check["found"] or "29 d 23 h" in check["found"]
            with dcnr.connect(f"{ahead.address},{behind.address}") as client:
                assert abs(client.status().unix_s - time.time() - MONTH_S) < 3600
                run = train(client, columns, STEPS)
                steps, kinds = [], []
                for event in run:
                    kinds.append(event.kind)
                    if isinstance(event, dcnr.StepDone):
                        steps.append(event.step)
                        if event.step == KILL_AT:
                            ahead.kill_orchestrator()
                assert steps == list(range(1, STEPS + 1))
                assert kinds[-1] == "finished"
                assert_equals_oracle(run, columns, STEPS)
