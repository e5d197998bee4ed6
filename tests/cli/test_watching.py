"""What is said of the network as it is."""

from __future__ import annotations

from typing import Any

import pytest

from dcnr.cli.watching import _drained
from dcnr.ids import Incarnation, PeerId
from dcnr.protocol.messages import Capabilities, Descriptor, NodeInfo


def node(**changed: Any) -> NodeInfo:
    return NodeInfo(
        descriptor=Descriptor(
            peer=PeerId("p"),
            incarnation=Incarnation(boot=1, nonce="n"),
            role="pnode",
            addresses=(),
            version_min=1,
            version_max=1,
        ),
        capabilities=Capabilities(
            cores=1, memory_bytes=1, architecture="x", numeric_class="c", class_facts=(), gflops=1.0, threads=1
        ),
        colour="green",
        silent_s=0.0,
        memory_free_bytes=1,
        **({"vnodes": (), "tasks_done": 0, "leaving": False} | changed),
    )


@pytest.mark.parametrize(
    ("before", "undo", "said"),
    [
        (node(vnodes=("s/a",)), False, "gives up its VNodes, if there is another place"),
        (None, False, "gives up its VNodes, if there is another place"),
        (node(leaving=True, vnodes=("s/a", "s/b")), False, "is giving up its VNodes already: it hosts 2"),
        (node(leaving=True), False, "is drained already: it hosts nothing"),
        (node(leaving=True), True, "takes VNodes again"),
        (node(), True, "was not drained"),
    ],
)
def test_draining_twice_is_not_told_as_if_it_were_new(before: NodeInfo | None, undo: bool, said: str) -> None:
    assert said in _drained(before, "p", undo=undo)
