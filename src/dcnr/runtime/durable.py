"""Writes that are there after a power cut: what a home's files and the folder store are made of."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

if sys.platform != "win32":
    import fcntl


def sync_file(descriptor: int) -> None:
    """Its bytes reach the medium. Raises ``OSError``."""
    if sys.platform == "darwin":
        # macOS's fsync stops at the drive's own cache; this one does not.
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """The names in it reach the medium. Raises ``OSError``."""
    if sys.platform == "win32":
        return  # Windows cannot open a folder; NTFS journals its entries.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync_file(descriptor)
    finally:
        os.close(descriptor)


def replace_durably(path: Path, data: bytes) -> None:
    """Whole or not at all, over what was there: a temporary file, its bytes durable, its name, its name durable.

    Raises ``OSError``; then what was there is there still, and nothing else.
    """
    replace_whole(path, data, durable=True)


def replace_whole(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Whole or not at all for other processes; not ``durable`` = it may be lost with the power. Raises ``OSError``."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            if durable:
                sync_file(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)
