"""Joins the client library to its adapters: what ``dcnr.connect`` and ``dcnr.local`` are made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dcnr.adapters.grpc.client import DataClient, OrchestratorClient
from dcnr.adapters.yaml_network import load_network
from dcnr.client.blocking import Client
from dcnr.client.connect import AsyncClient
from dcnr.client.local import LocalClient
from dcnr.client.ports import DataSource, Prepared, Tokenizer, Toolkit
from dcnr.errors import UsageError
from dcnr.ids import PeerId
from dcnr.network.builder import Graph
from dcnr.protocol.messages import RowsRef
from dcnr.runtime.tensors import CountedTable, NumpyBackend


class NumpyDataClient(DataClient):
    """The data service of one address, with rows as numpy arrays."""

    def __init__(self, address: str) -> None:
        self._arrays = CountedTable(NumpyBackend())
        super().__init__(address, self._arrays)

    async def columns(self, ref: RowsRef) -> dict[str, Any]:
        tensors = await self.rows(PeerId(""), ref)
        found = {name: self._arrays.get(tensor.handle) for name, tensor in zip(ref.columns, tensors, strict=True)}
        for tensor in tensors:
            self._arrays.release(tensor.handle)
        return found


def _prepare(
    source: DataSource,
    tokenizer: str,
    name: str,
    split: float | None,
    invalid_utf8: str,
    dtypes: Mapping[str, str] | None = None,
) -> Prepared:
    # The tokenizers library is loaded by who adds data, not by who looks at nodes.
    from dcnr.adapters import columns, text

    if isinstance(source, Mapping):
        if dtypes:
            raise UsageError("dtypes are for files: an array has its own, and astype() gives it another")
        return text.prepare_columns(source, name=name or "columns", split=split or 0.0)
    given = [source] if isinstance(source, str | Path) else list(source)
    files = text.data_files(given)
    share = text.VALIDATION_SPLIT if split is None else split
    if columns.is_columns(files):
        arrays = columns.read_columns(files, dtypes or columns.NO_DTYPES)
        return text.prepare_columns(arrays, name=name or text.default_name(given[0]), split=share)
    if dtypes:
        raise UsageError("dtypes are for columns: tokens of text have their own")
    return text.prepare_text(given, tokenizer=tokenizer, name=name, split=share, invalid_utf8=invalid_utf8, files=files)


def _load_tokenizer(data: bytes) -> Tokenizer:
    from dcnr.adapters import text

    return text.load_tokenizer(data)


TOOLKIT = Toolkit(
    open_calls=OrchestratorClient,
    open_data=NumpyDataClient,
    prepare=_prepare,
    load_tokenizer=_load_tokenizer,
    load_network=load_network,
)


def connect(address: str) -> Client:
    """``dcnr.connect``: a blocking client of the network whose orchestrators listen at ``host:port,...``."""
    return Client(address, TOOLKIT)


def connect_async(address: str) -> AsyncClient:
    """``dcnr.AsyncClient``: the asynchronous twin of :func:`connect`; call it inside a running loop."""
    return AsyncClient(address, TOOLKIT)


def local(*, pnodes: int = 3, threads: int = 1, home: str | Path | None = None) -> LocalClient:
    """``dcnr.local``: a network in child processes; leaving the ``with`` block ends it."""
    return LocalClient(TOOLKIT, pnodes=pnodes, threads=threads, home=home)


def load(path: str | Path) -> Graph:
    """``dcnr.load``: the graph of a network file. Raises :class:`~dcnr.errors.InvalidNetwork`."""
    return Graph.from_definition(load_network(Path(path)))
