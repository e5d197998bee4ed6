"""Files in and out of ``dcnr forward``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dcnr.cli.forward import read_npz, write_npz
from dcnr.cli.main import app
from dcnr.errors import InvalidData


def test_any_name_is_written_and_read_back(tmp_path: Path) -> None:
    arrays = {name: np.full((2, 3), i, np.float32) for i, name in enumerate(("file", "allow_pickle", "a/b", "ü"))}
    write_npz(tmp_path / "out.npz", arrays)
    found = read_npz(tmp_path / "out.npz")
    assert list(found) == list(arrays)
    assert all((found[name] == array).all() for name, array in arrays.items())
    assert [path.name for path in tmp_path.iterdir()] == ["out.npz"]


def test_a_file_that_cannot_be_written_whole_leaves_the_older_one(tmp_path: Path) -> None:
    write_npz(tmp_path / "out.npz", {"x": np.ones(1)})
    with pytest.raises(ValueError, match="allow_pickle"):
        write_npz(tmp_path / "out.npz", {"y": np.array([object()])})
    assert list(read_npz(tmp_path / "out.npz")) == ["x"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.npz"]


def test_files_that_hold_no_plain_arrays_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    np.save(tmp_path / "one.npy", np.ones(3))
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], dtype=object))
    np.savez(tmp_path / "cut.npz", x=np.ones(1000))
    data = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[:500] + bytes(100) + data[600:])
    np.savez_compressed(tmp_path / "squeezed.npz", x=np.arange(1000))
    data = (tmp_path / "squeezed.npz").read_bytes()
    (tmp_path / "squeezed.npz").write_bytes(data[:100] + bytes(100) + data[200:])
    for name in ("text.npz", "one.npy", "pickled.npz", "cut.npz", "squeezed.npz"):
        with pytest.raises(InvalidData, match=name):
            read_npz(tmp_path / name)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["absent.npz", "out.npz"], "no input file absent.npz"),
        (["in.npz", "out.txt"], "--output takes a file named .npz"),
        (["in.npz", "absent/out.npz"], "--output: no folder absent"),
    ],
)
def test_wrong_usage(given: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["forward", "net", "--input", given[0], "--output", given[1]])
    assert result.exit_code == 2
    assert said in result.stderr
