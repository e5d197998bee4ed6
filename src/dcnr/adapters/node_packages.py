"""Node types of packages that the owner of a machine has installed: the entry-point group ``dcnr.nodes``.

An entry point names a :class:`~dcnr.network.node_type.NodeType` or a sequence of them. Code never travels: a network with such a
type runs on machines whose owners have installed the same package, which the catalogue's digest tells apart.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points

from dcnr.errors import UsageError
from dcnr.network.node_type import NodeType
from dcnr.network.types import register

GROUP = "dcnr.nodes"


@functools.cache
def install() -> None:
    """Add every installed type to the catalogue, once per process and before any network is read.

    Raises :class:`UsageError` naming the package whose types cannot be added.
    """
    register_from(entry_points(group=GROUP))


def register_from(points: Iterable[EntryPoint]) -> None:
    """Raises :class:`UsageError`."""
    for point in sorted(points, key=lambda point: point.name):
        package = "a package" if point.dist is None else f"{point.dist.name} {point.dist.version}"
        where = f"entry point {point.name!r} of {package} in group {GROUP}"
        try:
            found = point.load()
        except (ImportError, AttributeError) as error:
            raise UsageError(f"{where}: {error}; mend or remove the package") from error
        kinds = found if isinstance(found, list | tuple) else (found,)
        for kind in kinds:
            if not isinstance(kind, NodeType):
                raise UsageError(f"{where}: found {kind!r}, expected a dcnr.network.node_type.NodeType")
        try:
            register(replace(kind, package=package) for kind in kinds)
        except ValueError as error:
            raise UsageError(f"{where}: {error}") from error
