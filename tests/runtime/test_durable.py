"""Durable writes: what is synced, in which order, and what a failure leaves."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

from dcnr.runtime import durable


def test_bytes_then_name_then_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace: list[str] = []
    replace = os.replace

    def traced_replace(source: Path, target: Path) -> None:
        trace.append(f"name {target.name}")
        replace(source, target)

    monkeypatch.setattr(
        durable, "sync_file", lambda descriptor: trace.append(f"sync {os.fstat(descriptor).st_size > 0}")
    )
    monkeypatch.setattr(durable, "sync_folder", lambda folder: trace.append(f"folder {folder.name}"))
    monkeypatch.setattr(os, "replace", traced_replace)
    (tmp_path / "home").mkdir()
    durable.replace_durably(tmp_path / "home" / "fence.json", b"1")
    assert trace == ["sync True", "name fence.json", "folder home"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    durable.replace_durably(tmp_path / "a", b"old")

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=os.strerror(code)):
        durable.replace_durably(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_macos_is_told_to_empty_the_drives_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(durable.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(durable.fcntl, "fcntl", lambda descriptor, command: asked.append((descriptor, command)))
    durable.sync_file(7)
    assert asked == [(7, 51)]
