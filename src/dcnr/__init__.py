"""DCNR, the Distributed Composable Neural Runtime: many machines train and serve one model.

Every public name is loaded when it is first used (PEP 562), so that ``import dcnr`` loads neither gRPC nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcnr import errors as errors
    from dcnr import oracle as oracle
    from dcnr import wiring as _wiring
    from dcnr.errors import DCNRError as DCNRError
    from dcnr.network import templates as templates
    from dcnr.network.builder import Graph as Graph
    from dcnr.session.events import CheckpointCommitted as CheckpointCommitted
    from dcnr.session.events import Evaluated as Evaluated
    from dcnr.session.events import ExactnessLost as ExactnessLost
    from dcnr.session.events import Failed as Failed
    from dcnr.session.events import Finished as Finished
    from dcnr.session.events import PNodeLost as PNodeLost
    from dcnr.session.events import Replaying as Replaying
    from dcnr.session.events import StepDone as StepDone
    from dcnr.session.events import Stopped as Stopped
    from dcnr.session.events import Suspended as Suspended
    from dcnr.session.events import VNodeMoved as VNodeMoved
    from dcnr.session.recipe import SGD as SGD
    from dcnr.session.recipe import WSD as WSD
    from dcnr.session.recipe import Adam as Adam
    from dcnr.session.recipe import AdamW as AdamW
    from dcnr.session.recipe import Constant as Constant
    from dcnr.session.recipe import Cosine as Cosine
    from dcnr.session.recipe import Linear as Linear
    from dcnr.session.recipe import Muon as Muon
    from dcnr.wiring import connect as connect
    from dcnr.wiring import load as load
    from dcnr.wiring import local as local

    AsyncClient = _wiring.connect_async

_EVENTS = "dcnr.session.events"
_RECIPE = "dcnr.session.recipe"

_HOMES: dict[str, tuple[str, str | None]] = {
    "local": ("dcnr.wiring", "local"),
    "connect": ("dcnr.wiring", "connect"),
    "AsyncClient": ("dcnr.wiring", "connect_async"),
    "load": ("dcnr.wiring", "load"),
    "Graph": ("dcnr.network.builder", "Graph"),
    "templates": ("dcnr.network.templates", None),
    "oracle": ("dcnr.oracle", None),
    "errors": ("dcnr.errors", None),
    "DCNRError": ("dcnr.errors", "DCNRError"),
    "AdamW": (_RECIPE, "AdamW"),
    "Adam": (_RECIPE, "Adam"),
    "SGD": (_RECIPE, "SGD"),
    "Muon": (_RECIPE, "Muon"),
    "Cosine": (_RECIPE, "Cosine"),
    "Linear": (_RECIPE, "Linear"),
    "WSD": (_RECIPE, "WSD"),
    "Constant": (_RECIPE, "Constant"),
    "StepDone": (_EVENTS, "StepDone"),
    "PNodeLost": (_EVENTS, "PNodeLost"),
    "VNodeMoved": (_EVENTS, "VNodeMoved"),
    "Replaying": (_EVENTS, "Replaying"),
    "CheckpointCommitted": (_EVENTS, "CheckpointCommitted"),
    "Evaluated": (_EVENTS, "Evaluated"),
    "ExactnessLost": (_EVENTS, "ExactnessLost"),
    "Suspended": (_EVENTS, "Suspended"),
    "Stopped": (_EVENTS, "Stopped"),
    "Failed": (_EVENTS, "Failed"),
    "Finished": (_EVENTS, "Finished"),
}
"""Public name to its module and its name there (``None``: the module itself)."""

_BOUND = ("Graph", "templates", "load")
"""Names that give a ``Graph``: its ``to_yaml`` and ``to_torch`` are adapters, bound by the composition root."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dcnr' has no attribute {name!r}")
    if name != "errors":
        importlib.import_module("dcnr.adapters.node_packages").install()
    if name in _BOUND:
        importlib.import_module("dcnr.app")
    module, inner = _HOMES[name]
    loaded = importlib.import_module(module)
    value = loaded if inner is None else getattr(loaded, inner)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
