"""A whole network whose store is a bucket of a real S3 server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

import dcnr
from dcnr.errors import Unavailable
from dcnr.runtime.supervisor import LocalNetwork
from tests.s3_server import S3Server

STEPS = 9
KILL_AT = 4


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dcnr.cli.main", *words], capture_output=True, text=True, timeout=200)


@pytest.fixture
def url(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3.new_bucket()}/network"


@pytest.mark.timeout(400)
def test_a_session_in_a_bucket_survives_its_orchestrator_and_verifies(url: str, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("".join(f"{n} green bottles hanging on the wall\n" for n in range(400)))
    model = dcnr.templates.gpt(layers=2, dim=16, heads=2, vocab=300, context=8)
    with LocalNetwork(tmp_path / "network", 2, 1, store=url) as local, dcnr.connect(local.address) as client:
        for pid in local.pids:
            assert not [name for name in psutil.Process(pid).environ() if name.startswith("AWS_")]
        run = client.train(
            model,
            data=str(book),
            tokenizer="bpe:300",
            steps=STEPS,
            batch_size=4,
            microbatches=2,
            checkpoint_every=3,
        )
        steps = []
        for event in run:
            if isinstance(event, dcnr.StepDone):
                steps.append(event.step)
                if event.step == KILL_AT:
                    local.kill_orchestrator()
                    local.start_orchestrator()
        assert steps == list(range(1, STEPS + 1))
        verified = command("session", "verify", run.id, "--network", local.address, "--json")
        assert verified.returncode == 0, verified.stdout + verified.stderr
    assert not (tmp_path / "network" / "store").exists()
    listed: Any = json.loads(command("doctor", "--store", url, "--json").stdout.splitlines()[-1])
    assert (listed["check"], listed["ok"]) == ("store", True)


def test_a_store_that_cannot_be_used_ends_the_orchestrator_with_the_reason(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with pytest.raises(Unavailable, match="exit code 1") as caught, LocalNetwork(tmp_path, 1, 1, store=url):
        pass
    assert f"store {url} at http://127.0.0.1:" in str(caught.value)
    assert "AWS_SECRET_ACCESS_KEY is not the secret" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    ended = command("doctor", "--store", "s3://not-there-at-all/x")
    assert ended.returncode == 1
    assert "AWS_SECRET_ACCESS_KEY" in ended.stdout
