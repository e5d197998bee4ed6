"""Columns from files: npz, npy, csv and parquet in, named arrays whose first axis is the row out."""

from __future__ import annotations

import csv
import math
import re
import tokenize
import zipfile
import zlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from dcnr.errors import InvalidData, UsageError
from dcnr.network.types import nearest

Arrays = dict[str, NDArray[np.generic]]

ELEMENT = re.compile(r"(.+)\.(\d+)")
"""``x.0``, ``x.1``, ... of a csv are the elements of one column ``x``."""
WHOLE = re.compile(r"\s*[+-]?[0-9]+\s*")
DTYPES = ("float32", "float64", "int64")
"""That a column may be asked for in: those of a dataset."""
NO_DTYPES: Mapping[str, str] = MappingProxyType({})
UNREADABLE = (
    *(OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error),
    # numpy reads the header of an array as Python.
    *(SyntaxError, tokenize.TokenError, TypeError, OverflowError),
)
"""What readers raise for a damaged file."""


def is_columns(files: Sequence[Path]) -> bool:
    """Whether ``files`` hold columns, not text. Raises :class:`UsageError` for a mixture that can be neither."""
    binary = [path for path in files if path.suffix.lower() in BINARY]
    readable = [path for path in files if path.suffix.lower() in READERS]
    if binary and len(readable) < len(files):
        other = next(path for path in files if path not in readable)
        raise UsageError(f"{binary[0]} holds columns and {other} text: add them as two datasets")
    return len(readable) == len(files)


def read_columns(files: Sequence[Path], dtypes: Mapping[str, str] = NO_DTYPES) -> Arrays:
    """The columns of all ``files``, in the order in which they are met; those that ``dtypes`` names in the dtype it says.

    Files continue each other, row after row, and must have the same columns. An npy file is one column, named by the
    file, so npy files of other names lie side by side. Raises :class:`InvalidData` with the file's name where it
    cannot be read, differs from those before it or does not fit its dtype, :class:`UsageError` for a missing library and
    for ``dtypes`` that name no column or no dtype.
    """
    for name, dtype in dtypes.items():
        if dtype not in DTYPES:
            raise UsageError(f"dtype of column {name!r}: found {dtype!r}, expected {nearest(dtype, DTYPES)}")
    parts: dict[str, list[NDArray[np.generic]]] = {}
    for path in files:
        found = read_arrays(path, dtypes)
        if parts and path.suffix.lower() != ".npy" and found.keys() != parts.keys():
            raise InvalidData(
                f"{path}: found columns {', '.join(found)}; expected {', '.join(parts)} as in {files[0]}: files of one "
                "dataset have the same columns"
            )
        for name, values in found.items():
            before = parts.setdefault(name, [])
            if before and (before[0].dtype, before[0].shape[1:]) != (values.dtype, values.shape[1:]):
                raise InvalidData(
                    f"{path}: column {name!r}: found {values.dtype} {list(values.shape[1:])}, expected "
                    f"{before[0].dtype} {list(before[0].shape[1:])} as in the files before it"
                )
            before.append(values)
    if unknown := [name for name in dtypes if name not in parts]:
        raise UsageError(
            f"dtype of column {unknown[0]!r}: found no such column, expected {nearest(unknown[0], tuple(parts))}"
        )
    return {name: found[0] if len(found) == 1 else np.concatenate(found) for name, found in parts.items()}


def read_arrays(path: Path, dtypes: Mapping[str, str] = NO_DTYPES) -> Arrays:
    """The columns of one file, see :func:`read_columns`. Raises :class:`InvalidData` with its name where it cannot be read or holds no numbers."""
    try:
        found = READERS[path.suffix.lower()](path, dtypes)
    except MemoryError as error:
        raise InvalidData(f"{path}: cannot be read: what it announces does not fit into memory") from error
    except UNREADABLE as error:
        # numpy's advice on what else to allow is not for files that come from elsewhere.
        reason = str(error).partition("\n")[0]
        if "pickle" in reason:
            reason = "found no arrays of numbers (another kind of file, or Python objects, which are never loaded)"
        raise InvalidData(f"{path}: cannot be read: {reason}") from error
    if not found:
        raise InvalidData(f"{path}: no columns")
    for name, values in found.items():
        if values.ndim == 0:
            raise InvalidData(f"{path}: column {name!r} has no rows: it is a single number")
        if values.dtype.kind not in "iubf":
            raise InvalidData(f"{path}: column {name!r}: found dtype {values.dtype}, expected numbers")
        if name in dtypes:
            found[name] = _converted(f"{path}: column {name!r}", values, np.dtype(dtypes[name]))
    return found


def _converted(where: str, values: NDArray[np.generic], dtype: np.dtype[Any]) -> NDArray[np.generic]:
    """Real numbers are rounded to real ones, as asked for; between whole and real ones every value must stay what it is."""
    given: Any = values
    with np.errstate(all="ignore"):
        made = given.astype(dtype, copy=False)
        match given.dtype.kind, dtype.kind:
            case "f", "f":
                kept = np.isfinite(made) == np.isfinite(given)
            case "f", _:
                kept = (given == np.trunc(given)) & (np.abs(given) < 2.0**63)
            case _, "f":
                # Up to here it has every whole number; beyond, only some.
                most = 2 ** (np.finfo(dtype).nmant + 1)
                kept = (given >= -most) & (given <= most)
            case _:
                kept = given <= np.iinfo(dtype).max
    if not kept.all():
        raise InvalidData(f"{where}: {given[~kept].flat[0]} is no {dtype}")
    return cast(NDArray[np.generic], made)


def _npz(path: Path, _: Mapping[str, str]) -> Arrays:
    with path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("one array, not an archive of arrays: name it .npy")
        found: Arrays = {}
        for name in archive.files:
            # A member that is no array comes as its bytes.
            if not isinstance(member := archive[name], np.ndarray):
                raise ValueError(f"{name!r} in it is no array")
            found[name] = member
        return found


def _npy(path: Path, _: Mapping[str, str]) -> Arrays:
    with path.open("rb") as file:
        values = np.load(file, allow_pickle=False)
        if isinstance(values, np.lib.npyio.NpzFile):
            raise ValueError("an archive of arrays, not one array: name it .npz")
        return {path.stem: values}


# --- csv ---------------------------------------------------------------------------------------------------


class _Field:
    """One field of a csv, line after line: int64 as long as all are whole, else numbers for float32, or float64."""

    def __init__(self, path: Path, name: str, real: np.dtype[Any]) -> None:
        self._real = real
        self._most = float(np.finfo(real).max)
        self._where = f"{path}: line {{}}, column {name!r}"
        self._numbers: array[Any] = array("q")
        self._whole = True
        self._beyond: str | None = None
        """Why this cannot be int64, should all be whole."""

    def add(self, line: int, text: str) -> None:
        if WHOLE.fullmatch(text):
            number: float = int(text)
            if not -(2**63) <= number < 2**63:
                self._beyond = self._beyond or f"{self._where.format(line)}: {text} is beyond int64"
                self._become_real()
        else:
            try:
                # Python's own notation of long numbers, 1_000, is nobody else's.
                number = float(text if "_" not in text else "")
            except ValueError:
                raise InvalidData(f"{self._where.format(line)}: found {text!r}, expected a number") from None
            self._whole = False
            self._become_real()
        # Infinity where the text says so is a number of its own; where it says 1e400, it is too large a number.
        said = math.isinf(number) and not any(map(str.isdigit, text))
        if self._numbers.typecode == "d" and abs(number) > self._most and not said:
            raise InvalidData(f"{self._where.format(line)}: {text} is beyond {self._real}")
        self._numbers.append(number)

    def _become_real(self) -> None:
        if self._numbers.typecode == "q":
            self._numbers = array("d", self._numbers)

    def values(self) -> NDArray[np.generic]:
        if not self._whole:
            return np.frombuffer(self._numbers, dtype=np.float64).astype(self._real)
        if self._beyond:
            raise InvalidData(self._beyond)
        return np.frombuffer(self._numbers, dtype=np.int64)


def _csv(path: Path, dtypes: Mapping[str, str]) -> Arrays:
    """The first line names the columns. Whole numbers become int64; a column with any other number becomes float32, or
    float64 where ``dtypes`` says so."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = csv.reader(file, strict=True)
        try:
            header = next(lines, [])
            if not header or len(set(header)) < len(header) or not all(header) or all(map(_is_number, header)):
                raise InvalidData(f"{path}: line 1: found {','.join(header)!r}, expected the columns' names, each once")
            places = _grouped(path, header)
            wide = {place for name, members in places.items() if dtypes.get(name) == "float64" for place in members}
            fields = [
                _Field(path, name, np.dtype("float64" if place in wide else "float32"))
                for place, name in enumerate(header)
            ]
            for row in lines:
                if not row:
                    continue
                if len(row) != len(header):
                    raise InvalidData(
                        f"{path}: line {lines.line_num}: found {len(row)} fields, expected {len(header)} as in line 1"
                    )
                for field, text in zip(fields, row, strict=True):
                    field.add(lines.line_num, text)
        except csv.Error as error:
            raise InvalidData(f"{path}: line {lines.line_num}: {error}") from error
    found: Arrays = {}
    for name, members in places.items():
        elements = [fields[place].values() for place in members]
        if ELEMENT.fullmatch(header[members[0]]):
            # Elements of both kinds: real numbers hold all that the file's numbers mean together.
            reals = [values.dtype for values in elements if values.dtype != np.int64]
            found[name] = np.stack(elements, axis=1).astype(reals[0] if reals else np.int64, copy=False)
        else:
            found[name] = elements[0]
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _grouped(path: Path, header: Sequence[str]) -> dict[str, list[int]]:
    """Column to the places of its elements."""
    groups: dict[str, list[int]] = {}
    for place, name in enumerate(header):
        element = ELEMENT.fullmatch(name)
        column = element[1] if element else name
        places = groups.setdefault(column, [])
        if (places and element is None) or (element and int(element[2]) != len(places)):
            raise InvalidData(
                f"{path}: line 1: found {name!r}; the elements of a column are {column}.0, {column}.1, ... in that order"
            )
        places.append(place)
    return groups


# --- parquet -----------------------------------------------------------------------------------------------


def _parquet(path: Path, _: Mapping[str, str]) -> Arrays:
    try:
        import pyarrow.compute
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(f"{path}: parquet needs pyarrow: pip install 'dcnr[parquet]'") from error
    try:
        table: Any = parquet.ParquetFile(path).read()
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error
    if len(set(table.column_names)) < len(table.column_names):
        raise ValueError(f"columns named more than once: {', '.join(table.column_names)}")
    return {
        name: _arrow_column(path, name, column.combine_chunks(), pyarrow)
        for name, column in zip(table.column_names, table.columns, strict=True)
    }


def _arrow_column(path: Path, name: str, column: Any, pyarrow: Any) -> NDArray[np.generic]:
    """Numbers and booleans, or lists of them of one length, however deep."""
    if column.null_count:
        raise InvalidData(f"{path}: column {name!r} has {column.null_count} missing values")
    kind = column.type
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind):
        inner = _arrow_column(path, name, column.flatten(), pyarrow)
        rows = len(column)
        lengths = set(pyarrow.compute.unique(pyarrow.compute.list_value_length(column)).to_pylist())
        if len(lengths) > 1:
            raise InvalidData(f"{path}: column {name!r} has lists of {min(lengths)} to {max(lengths)} elements")
        return inner.reshape(rows, *lengths, *inner.shape[1:])
    if not (pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind) or pyarrow.types.is_boolean(kind)):
        raise InvalidData(f"{path}: column {name!r} has type {kind}; known: numbers, booleans and lists of them")
    values: NDArray[np.generic] = column.to_numpy(zero_copy_only=False)
    return values


READERS: Mapping[str, Callable[[Path, Mapping[str, str]], Arrays]] = {
    ".npz": _npz,
    ".npy": _npy,
    ".csv": _csv,
    ".parquet": _parquet,
}
"""By the ending of the file's name."""
BINARY = (".npz", ".npy", ".parquet")
