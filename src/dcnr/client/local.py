"""``dcnr.local``: a whole network in child processes of this one, for as long as a ``with`` block lasts."""

from __future__ import annotations

import tempfile
from pathlib import Path

from dcnr.client.blocking import Client
from dcnr.client.ports import Toolkit
from dcnr.runtime.supervisor import LocalNetwork


class LocalClient:
    """Starts one orchestrator and ``pnodes`` PNodes, gives a :class:`Client`, and ends them all.

    ``home``: the folder that holds everything; a temporary one, removed at the end, where it is ``None``.
    """

    def __init__(self, toolkit: Toolkit, *, pnodes: int = 3, threads: int = 1, home: str | Path | None = None) -> None:
        self._toolkit = toolkit
        self._temporary = tempfile.TemporaryDirectory(prefix="dcnr-") if home is None else None
        self._network = LocalNetwork(Path(self._temporary.name if self._temporary else str(home)), pnodes, threads)
        self._client: Client | None = None

    def __enter__(self) -> Client:
        self._network.start()
        try:
            self._client = Client(self._network.address, self._toolkit)
        except BaseException:
            self._end()
            raise
        return self._client

    def __exit__(self, *_: object) -> None:
        if self._client is not None:
            self._client.close()
        self._end()

    def _end(self) -> None:
        self._network.stop()
        if self._temporary is not None:
            self._temporary.cleanup()
