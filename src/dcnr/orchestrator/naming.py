"""What people call things by: whole ids, or beginnings of them."""

from __future__ import annotations

from collections.abc import Iterable

from dcnr.errors import UnknownName

PREFIX_LEAST = 4
"""Shorter beginnings are taken for slips."""


def begun(name: str, known: Iterable[str], what: str, see: str) -> str:
    """The only one of ``known`` that is ``name`` or begins with it. Raises :class:`UnknownName`: ``what`` it is, and the
    command to ``see`` all of them."""
    ids = list(known)
    if name in ids:
        return name
    if len(name) < PREFIX_LEAST:
        raise UnknownName(f"no {what} {name!r}: a beginning has {PREFIX_LEAST} characters at least; see `{see}`")
    found = [each for each in ids if each.startswith(name)]
    if len(found) != 1:
        raise UnknownName(f"{'more than one' if found else 'no'} {what} {name!r}: see `{see}`")
    return found[0]
