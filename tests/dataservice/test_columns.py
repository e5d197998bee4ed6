"""Columns read from files of every format, and the choice between columns and text."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from dcnr.adapters import text
from dcnr.adapters.columns import is_columns, read_columns
from dcnr.errors import InvalidData, UsageError
from dcnr.session.dataset import Manifest
from dcnr.wiring import TOOLKIT

X = np.arange(12, dtype=np.float32).reshape(4, 3)
Y = np.array([3, 1, 2, 0])


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


class TestFormats:
    def test_npz(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=X, y=Y)
        same(read_columns([tmp_path / "a.npz"]), {"x": X, "y": Y})

    def test_npy_columns_are_named_by_their_files(self, tmp_path: Path) -> None:
        np.save(tmp_path / "x.npy", X)
        np.save(tmp_path / "y.npy", Y)
        same(read_columns([tmp_path / "x.npy", tmp_path / "y.npy"]), {"x": X, "y": Y})

    def test_csv(self, tmp_path: Path) -> None:
        text = "\ufeffx.0,x.1,label,weight\r\n1,2.5,-7,1e3\r\n\r\n-3,4,+8,nan\r\n0,0,0, -Inf\r\n"
        same(
            read_columns([write(tmp_path / "a.csv", text)]),
            {
                "x": np.array([[1, 2.5], [-3, 4], [0, 0]], dtype=np.float32),
                "label": np.array([-7, 8, 0]),
                "weight": np.array([1000, np.nan, -np.inf], dtype=np.float32),
            },
        )

    def test_a_csv_says_no_dtypes_so_one_may_be_asked_for(self, tmp_path: Path) -> None:
        """Also where one file has whole numbers alone and the next has not."""
        files = [
            write(tmp_path / "a.csv", "x.0,x.1,y,z\n1,2,0,1\n16777216,-16777216,1.0,2\n"),
            write(tmp_path / "b.csv", "x.0,x.1,y,z\n0.1,2,1,3\n"),
        ]
        with pytest.raises(InvalidData, match=r"b.csv: column 'x': found float32 \[2\], expected int64"):
            read_columns(files)
        asked = {"x": "float32", "y": "int64", "z": "float64"}
        wanted = {
            "x": np.array([[1, 2], [2**24, -(2**24)], [0.1, 2]], dtype=np.float32),
            "y": np.array([0, 1, 1]),
            "z": np.array([1.0, 2.0, 3.0]),
        }
        same(read_columns(files, asked), wanted)
        same(
            read_columns(files, {**asked, "x": "float64"}),
            wanted | {"x": np.array([[1, 2], [2**24, -(2**24)], [0.1, 2]])},
        )

    def test_parquet(self, tmp_path: Path) -> None:
        table = pa.table(
            {
                "x": pa.FixedSizeListArray.from_arrays(pa.array(X.ravel()), 3),
                "y": Y,
                "deep": pa.array([[[1, 2], [3, 4]]] * 4, type=pa.list_(pa.list_(pa.int16()))),
                "yes": [True, False, True, True],
            }
        )
        # Two row groups: a column comes in pieces.
        parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
        wanted = {
            "x": X,
            "y": Y,
            "deep": np.array([[[1, 2], [3, 4]]] * 4, dtype=np.int16),
            "yes": np.array([True, False, True, True]),
        }
        same(read_columns([tmp_path / "a.parquet"]), wanted)

    def test_equal_columns_are_one_dataset_whatever_the_file(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=X, y=Y)
        np.save(tmp_path / "x.npy", X)
        np.save(tmp_path / "y.npy", Y)
        parquet.write_table(
            pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(X.ravel()), 3), "y": Y}), tmp_path / "a.parquet"
        )
        rows = "".join(f"{a}.0,{b},{c},{y}\n" for (a, b, c), y in zip(X.astype(int), Y, strict=True))
        write(tmp_path / "a.csv", "x.0,x.1,x.2,y\n" + rows)
        sources = [
            *([str(tmp_path / f"a.{kind}")] for kind in ("npz", "parquet", "csv")),
            [str(tmp_path / "x.npy"), str(tmp_path / "y.npy")],
            {"x": X, "y": Y},
            {"x": X.astype(">f4"), "y": Y.astype(np.int8)},
        ]
        manifests = {TOOLKIT.prepare(source, "", "same", 0.3, "refuse").manifest for source in sources}
        assert len(manifests) == 1

    def test_without_pyarrow_the_extra_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        monkeypatch.setitem(sys.modules, "pyarrow.compute", None)
        with pytest.raises(UsageError, match=r"a\.parquet: parquet needs pyarrow: pip install 'dcnr\[parquet\]'"):
            read_columns([write(tmp_path / "a.parquet", b"PAR1")])

    def test_files_of_the_same_columns_continue_each_other(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "1.npz", x=X[:1], y=Y[:1])
        np.savez(tmp_path / "2.npz", y=Y[1:], x=X[1:])
        same(read_columns([tmp_path / "1.npz", tmp_path / "2.npz"]), {"x": X, "y": Y})

    @pytest.mark.parametrize(
        ("arrays", "reason"),
        [
            ({"x": X[:, :2], "y": Y}, r"column 'x': found float32 \[2\], expected float32 \[3\]"),
            ({"x": X.astype(np.float64), "y": Y}, r"column 'x': found float64 \[3\], expected float32 \[3\]"),
            ({"x": X}, r"found columns x; expected x, y as in .*1\.npz"),
            ({"z": Y}, r"found columns z; expected x, y as in .*1\.npz"),
        ],
    )
    def test_files_that_differ_are_named(self, tmp_path: Path, arrays: dict[str, np.ndarray], reason: str) -> None:
        np.savez(tmp_path / "1.npz", x=X, y=Y)
        np.savez(tmp_path / "2.npz", **arrays)
        with pytest.raises(InvalidData, match=rf"2\.npz: {reason}"):
            read_columns([tmp_path / "1.npz", tmp_path / "2.npz"])


class TestDtypes:
    @pytest.mark.parametrize(
        ("values", "dtype", "found"),
        [
            (np.array([1, 2**24 + 1]), "float32", "16777217"),
            (np.array([-(2**63)]), "float32", "-9223372036854775808"),
            (np.array([2**53, 2**53 + 1]), "float64", "9007199254740993"),
            (np.array([1.0, 1.5]), "int64", "1.5"),
            (np.array([np.nan]), "int64", "nan"),
            (np.array([2.0**63]), "int64", r"9.22337203685477\d+e\+18"),
            (np.array([2**63], dtype=np.uint64), "int64", "9223372036854775808"),
            (np.array([1e39]), "float32", r"1e\+39"),
        ],
    )
    def test_what_would_become_another_number_is_refused(
        self, tmp_path: Path, values: np.ndarray[Any, Any], dtype: str, found: str
    ) -> None:
        np.savez(tmp_path / "a.npz", x=values)
        with pytest.raises(InvalidData, match=rf"a.npz: column 'x': ({found}) is no {dtype}"):
            read_columns([tmp_path / "a.npz"], {"x": dtype})

    def test_what_stays_is_taken(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=np.array([0.1, np.nan, np.inf]), y=np.array([3.0]), z=np.array([True]))
        asked = {"x": "float32", "y": "int64", "z": "float32"}
        same(
            read_columns([tmp_path / "a.npz"], asked),
            {"x": np.array([0.1, np.nan, np.inf], dtype=np.float32), "y": np.array([3]), "z": np.ones(1, np.float32)},
        )

    @pytest.mark.parametrize(
        ("dtypes", "reason"),
        [
            ({"x": "float23"}, "dtype of column 'x': found 'float23', expected 'float32'"),
            (
                {"features": "int64", "x": "int64"},
                "dtype of column 'features': found no such column, expected one of x",
            ),
        ],
    )
    def test_a_dtype_or_column_that_there_is_not(self, tmp_path: Path, dtypes: dict[str, str], reason: str) -> None:
        np.savez(tmp_path / "a.npz", x=np.arange(3))
        with pytest.raises(UsageError, match=reason):
            read_columns([tmp_path / "a.npz"], dtypes)

    def test_text_and_arrays_have_their_own(self, tmp_path: Path) -> None:
        text = write(tmp_path / "a.txt", "abc" * 100)
        with pytest.raises(UsageError, match="dtypes are for columns"):
            TOOLKIT.prepare(str(text), "bytes", "", None, "refuse", {"x": "int64"})
        with pytest.raises(UsageError, match="dtypes are for files"):
            TOOLKIT.prepare({"x": X}, "bytes", "", None, "refuse", {"x": "float64"})


class TestBadFiles:
    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("", r"line 1: found '', expected the columns' names, each once"),
            ("a,a\n1,2\n", r"line 1: found 'a,a', expected the columns' names, each once"),
            ("1,2\n3,4\n", r"line 1: found '1,2', expected the columns' names"),
            ("a,\n1,2\n", r"line 1: found 'a,', expected the columns' names"),
            ("a,b\n1,2\n1\n", "line 3: found 1 fields, expected 2 as in line 1"),
            ("a,b\n1,2,3\n", "line 2: found 3 fields, expected 2"),
            ("a,b\n1,2\n\n3,x\n", "line 4, column 'b': found 'x', expected a number"),
            ("a,b\n1,2\n3,\n", "line 3, column 'b': found '', expected a number"),
            ("a\n1_0\n", "line 2, column 'a': found '1_0', expected a number"),
            ("a\n1\n9223372036854775808\n", "line 3, column 'a': 9223372036854775808 is beyond int64"),
            ("a\n1.5\n-1e39\n", "line 3, column 'a': -1e39 is beyond float32"),
            ("a\n1.5\n1e400\n", "line 3, column 'a': 1e400 is beyond float32"),
            ('a\n"1\n2\n', "line 3: unexpected end of data"),
            ("x.0,x.2\n1,2\n", "line 1: found 'x.2'; the elements of a column are x.0, x.1"),
            ("x,x.0\n1,2\n", "line 1: found 'x.0'"),
            ("x.0,x\n1,2\n", "line 1: found 'x'"),
            (b"a\n\xff\n", "cannot be read: 'utf-8'"),
        ],
    )
    def test_csv(self, tmp_path: Path, text: str | bytes, reason: str) -> None:
        with pytest.raises(InvalidData, match=reason) as caught:
            read_columns([write(tmp_path / "a.csv", text)])
        assert "a.csv: " in str(caught.value)

    @pytest.mark.parametrize("suffix", ["npz", "npy", "parquet"])
    @pytest.mark.parametrize("data", [b"x", b"PK\x03\x04 and no more", b"\x93NUMPY\x01\x00", b"PAR1PAR1"])
    def test_damaged_files_are_named(self, tmp_path: Path, suffix: str, data: bytes) -> None:
        with pytest.raises(InvalidData, match=rf"a\.{suffix}: cannot be read: ."):
            read_columns([write(tmp_path / f"a.{suffix}", data)])

    @pytest.mark.parametrize("header", [b"{'descr': '<f4', (", b"{'descr': (1,", b"{'shape': 1L 2}", b"{[]: 1}", b"\0"])
    def test_an_array_whose_header_is_damaged_is_named(self, tmp_path: Path, header: bytes) -> None:
        data = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + header.ljust(117) + b"\n" + bytes(48)
        with pytest.raises(InvalidData, match=r"a\.npy: cannot be read: ."):
            read_columns([write(tmp_path / "a.npy", data)])

    def test_objects_are_not_loaded(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", np.array([{}, None], dtype=object), allow_pickle=True)
        with pytest.raises(InvalidData, match="Python objects"):
            read_columns([tmp_path / "a.npy"])

    @pytest.mark.parametrize(
        "values", [np.zeros(3, complex), np.array(["a"]), np.zeros(2, "i4,f8"), np.zeros(2, "M8[s]")]
    )
    def test_what_is_no_number_is_refused(self, tmp_path: Path, values: np.ndarray) -> None:
        np.save(tmp_path / "a.npy", values)
        with pytest.raises(InvalidData, match=r"a\.npy: column 'a': found dtype .*, expected numbers"):
            read_columns([tmp_path / "a.npy"])

    def test_one_under_the_others_name(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", X)
        np.savez(tmp_path / "b.npz", X)
        (tmp_path / "a.npy").rename(tmp_path / "a.npz")
        (tmp_path / "b.npz").rename(tmp_path / "b.npy")
        with pytest.raises(InvalidData, match=r"name it \.npy"):
            read_columns([tmp_path / "a.npz"])
        with pytest.raises(InvalidData, match=r"name it \.npz"):
            read_columns([tmp_path / "b.npy"])

    def test_members_that_are_no_arrays(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("notes.txt", "hello")
        with pytest.raises(InvalidData, match=r"a\.npz: cannot be read: 'notes\.txt' in it is no array"):
            read_columns([tmp_path / "a.npz"])
        with zipfile.ZipFile(tmp_path / "b.npz", "w"):
            pass
        with pytest.raises(InvalidData, match=r"b\.npz: no columns"):
            read_columns([tmp_path / "b.npz"])

    def test_a_small_file_that_announces_a_huge_array(self, tmp_path: Path) -> None:
        with (tmp_path / "a.npy").open("wb") as file:
            header = {"descr": "<f8", "fortran_order": False, "shape": (10**13,)}
            np.lib.format.write_array_header_1_0(file, header)
            file.write(bytes(100))
        with pytest.raises(InvalidData, match=r"a\.npy: cannot be read"):
            read_columns([tmp_path / "a.npy"])

    def test_a_number_is_no_column(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", np.float32(1))
        with pytest.raises(InvalidData, match="single number"):
            read_columns([tmp_path / "a.npy"])

    @pytest.mark.parametrize(
        ("column", "reason"),
        [
            ([1, None], "1 missing values"),
            ([[1, 2], [3]], "lists of 1 to 2 elements"),
            (["a", "b"], "type string; known"),
        ],
    )
    def test_parquet(self, tmp_path: Path, column: list[object], reason: str) -> None:
        parquet.write_table(pa.table({"c": column}), tmp_path / "a.parquet")
        with pytest.raises(InvalidData, match=f"column 'c' has .*{reason}"):
            read_columns([tmp_path / "a.parquet"])


class TestChoice:
    def test_by_the_files_names(self) -> None:
        assert is_columns([Path("a.NPZ"), Path("b.csv")])
        assert not is_columns([Path("a.txt"), Path("b.csv")])
        with pytest.raises(UsageError, match=r"a\.npz holds columns and b\.txt text"):
            is_columns([Path("a.npz"), Path("b.txt")])

    def test_the_toolkit_prepares_either(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "digits.npz", x=np.arange(100), y=np.arange(100.0))
        prepared = TOOLKIT.prepare(str(tmp_path / "digits.npz"), "bpe:300", "", None, "refuse")
        manifest = Manifest.from_bytes(prepared.manifest)
        assert (manifest.name, manifest.kind) == ("digits", "columns")
        assert manifest.train.count + manifest.validation.count == 100
        assert 0 < manifest.validation.count < 30
        text = write(tmp_path / "a.txt", "text " * 100)
        assert Manifest.from_bytes(TOOLKIT.prepare([text], "bytes", "", None, "refuse").manifest).kind == "text"

    def test_files_are_looked_for_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A large folder takes seconds, and what changes meanwhile would be text by one look and columns by another."""
        write(tmp_path / "a.txt", "text " * 100)
        looks: list[object] = []
        found = text.data_files

        def look(given: Sequence[str | Path]) -> list[Path]:
            looks.append(given)
            return found(given)

        monkeypatch.setattr(text, "data_files", look)
        manifest = Manifest.from_bytes(TOOLKIT.prepare(tmp_path, "bytes", "", None, "refuse").manifest)
        assert (manifest.name, looks) == (tmp_path.name, [[tmp_path]])

    def test_arrays_are_held_out_only_where_a_share_is_asked_for(self) -> None:
        counts = [
            Manifest.from_bytes(TOOLKIT.prepare({"x": np.arange(100)}, "", "", split, "refuse").manifest).train.count
            for split in (None, 0.3)
        ]
        assert counts[0] == 100
        assert 50 < counts[1] < 90
