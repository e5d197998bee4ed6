"""The catalogue: what a network may be made of, one table entry per node type.

An entry says which config keys a type has, what its tensors look like, which parameters it owns and what it costs: one
file per family in :mod:`dcnr.network.catalogue`. The arithmetic itself lives with the tensor library. Here the entries
become one table, and config values what their keys say.
"""

from __future__ import annotations

import difflib
import hashlib
import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from dcnr.network.catalogue import attending, costs, dense, elementwise, joins, norms, views
from dcnr.network.graph import INTEGERS, ConfigValue, json_bytes
from dcnr.network.node_type import (
    AXES_MOST,
    DIMENSION_MOST,
    INIT_STD,
    PRECISIONS,
    Key,
    NodeType,
    ParameterSpec,
    Settings,
    TensorSpec,
)

OPTIMIZER_KEYS: Final = ("optimizer", "lr_scale", "weight_decay", "trainable", "init", "init_std", "output_init_std")
"""Belong to the owner of a weight; a node that uses another's weight must not have them."""

COMMON_KEYS: Final[tuple[Key, ...]] = (
    Key(
        name="optimizer",
        kind="str",
        choices=("adam", "adamw", "sgd", "muon"),
        about="Of this node's weights, in place of the session's.",
    ),
    Key(name="lr_scale", kind="float", default=1.0, least=0.0, about="Times the session's learning rate."),
    Key(
        name="weight_decay",
        kind="float",
        least=0.0,
        about="In place of the session's; parameters of two or more dimensions decay.",
    ),
    Key(name="trainable", kind="bool", default=True, about="Whether its weights are updated."),
    Key(
        name="init",
        kind="str",
        default="normal",
        choices=("normal", "zeros"),
        about="Of parameters of two or more dimensions; biases start at 0, gains at 1.",
    ),
    Key(name="init_std", kind="float", default=INIT_STD, least=0.0, about="Standard deviation of `init: normal`."),
    Key(name="precision", kind="str", choices=PRECISIONS, about="Both of the next two; the network's when absent."),
    Key(name="param_precision", kind="str", choices=PRECISIONS, about="Of its weights."),
    Key(name="activation_precision", kind="str", choices=PRECISIONS, about="What it computes in, and of its outputs."),
    Key(name="colocate_group", kind="str", about="Nodes of one group stay on one PNode; needs `colocate_policy`."),
    Key(
        name="colocate_policy",
        kind="str",
        choices=("required",),
        about="How a group binds: each connected piece of it is computed as one unit.",
    ),
    Key(name="shared_weight_alias", kind="str", about="A name under which others may use its weight."),
    Key(name="tie_weight_alias", kind="str", about="Use the weight of the node that shares this name."),
)
ALIKE_LENGTH_MOST: Final = 64
"""Longest name that is compared with others: the work grows with its square, and nobody mistypes longer ones."""
COMPARED_MOST: Final = 50
"""Known names that a name is compared with in full: those of the most alike letters."""
PROBLEM_MOST: Final = 1000
"""Characters of one problem, of which the middle is left out: it may quote many texts, each as long as a text may be."""
NAMED_MOST: Final = 20
"""Nodes of one cycle that are named, and unknown names for which the nearest is searched: a hostile file could have
thousands of either, each as long as the file has nodes."""
KEYS_MOST: Final = 64
"""Config keys of one node: no type has half as many, and each unknown one costs a search for what was meant."""

BUILT_IN: Final[tuple[NodeType, ...]] = (
    *dense.TYPES,
    *norms.TYPES,
    *attending.TYPES,
    *elementwise.TYPES,
    *joins.TYPES,
    *views.TYPES,
    *costs.TYPES,
)

_types: dict[str, NodeType] = {kind.name: kind for kind in BUILT_IN}
_by_any_name: dict[str, NodeType] = {name: kind for kind in BUILT_IN for name in (kind.name, *kind.aliases)}
CATALOGUE: Final[Mapping[str, NodeType]] = _types
"""Every type by its first name, those of installed packages included once :func:`register` has been told."""


def register(kinds: Iterable[NodeType]) -> None:
    """Add types of installed packages, before any network is read.

    Raises ``ValueError`` for a type without ``package`` and for a name that another type has.
    """
    for kind in sorted(kinds, key=lambda kind: kind.name):
        if not kind.package:
            raise ValueError(f"node type {kind.name!r}: found no package, expected its name and version")
        for name in (kind.name, *kind.aliases):
            if name in _by_any_name:
                raise ValueError(f"node type {kind.name!r} of {kind.package}: found the name {name!r} taken")
        _types[kind.name] = kind
        _by_any_name.update(dict.fromkeys((kind.name, *kind.aliases), kind))


def cost_target(type_name: str, settings: Settings, found: TensorSpec) -> TensorSpec:
    """What a cost of this type compares its input with."""
    target = CATALOGUE[type_name].target
    assert target is not None
    return target(settings, found)


def find_type(name: str) -> NodeType | str:
    """The entry of a type's name or alias, else what is wrong with the name."""
    known = _by_any_name.get(name)
    if known is not None:
        return known
    if name in ("tokenizer", "detokenizer"):
        return "tokenizers belong to datasets: dcnr data add --tokenizer"
    expected = nearest(name, tuple(_by_any_name))
    # Who has the package is answered so by a peer that has not: an orchestrator, or who verifies.
    return f"unknown type: found {_shown(name)}, expected {expected}, or the package that has it on every peer"


def takes_text(type_name: str, name: str) -> bool:
    """Whether this config key of this type is a text."""
    kind = _by_any_name.get(type_name)
    return any(key.name == name and key.kind == "str" for key in (*(kind.keys if kind else ()), *COMMON_KEYS))


def orthogonalised(type_name: str, parameter: ParameterSpec) -> bool:
    """Whether Muon, where it is a node's optimizer, takes this parameter; AdamW takes the others."""
    return CATALOGUE[type_name].orthogonalised and len(parameter.shape) == 2


def nearest(name: str, known: Sequence[str], otherwise: str = "") -> str:
    """What may have been meant, else ``otherwise`` (everything that could be)."""
    close: list[str] = []
    if len(name) <= ALIKE_LENGTH_MOST:
        letters = set(name)

        def difference(other: str) -> tuple[int, int]:
            return (len(letters.symmetric_difference(other)), abs(len(other) - len(name)))

        short = (other for other in known if len(other) <= ALIKE_LENGTH_MOST)
        close = difflib.get_close_matches(name, heapq.nsmallest(COMPARED_MOST, short, key=difference), n=1)
    return repr(close[0]) if close else otherwise or f"one of {', '.join(known)}"


def fewer(names: list[str]) -> list[str]:
    """The first and the last of many."""
    if len(names) <= NAMED_MOST:
        return names
    half = NAMED_MOST // 2
    return [*names[:half], f"{len(names) - 2 * half} more", *names[-half:]]


def cut(problem: str) -> str:
    """A problem as it is told: long ones lose their middle."""
    half = PROBLEM_MOST // 2
    return problem if len(problem) <= PROBLEM_MOST else f"{problem[:half]} .. {problem[-half:]}"


# --- config values -----------------------------------------------------------------------------------------


def _convert(key: Key, value: ConfigValue) -> ConfigValue:
    """A value in the key's declared type. Raises ``ValueError`` naming what was expected."""
    match key.kind:
        case "bool":
            if isinstance(value, bool):
                return value
            if isinstance(value, str) and value.lower() in ("true", "false"):
                return value.lower() == "true"
            raise ValueError("true or false")
        case "int":
            return _integer(value, "an integer")
        case "ints":
            listed: Iterable[ConfigValue]
            if isinstance(value, str):
                listed = value.removeprefix("[").removesuffix("]").split(",", AXES_MOST)
            else:
                listed = value if isinstance(value, list | tuple) else (value,)
            expected = f"one to {AXES_MOST} integers, as in [2, -1]"
            found = tuple(_integer(item.strip() if isinstance(item, str) else item, expected) for item in listed)
            if not 1 <= len(found) <= AXES_MOST or any(abs(item) > DIMENSION_MOST for item in found):
                raise ValueError(expected)
            return found
        case "float":
            if not isinstance(value, str | int | float) or isinstance(value, bool):
                raise ValueError("a number")
            if isinstance(value, str) and "_" in value:
                # Python reads 1_0 as 10, and nobody else does.
                raise ValueError("a number")
            try:
                result = float(value)
            except (ValueError, OverflowError):
                raise ValueError("a number") from None
            if not math.isfinite(result):
                raise ValueError("a finite number")
            return result
        case _:
            if not isinstance(value, str):
                raise ValueError("a string")
            if not value:
                raise ValueError("a string that is not empty")
            return value


def _integer(value: object, expected: str) -> int:
    if isinstance(value, str) and len(value) <= 20 and value.removeprefix("-").isdecimal() and value.isascii():
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(expected)
    return value


def _checked(key: Key, value: ConfigValue) -> ConfigValue:
    """``value`` converted and within the key's range. Raises ``ValueError`` with the found and the expected."""
    assert value is not None
    try:
        result = _convert(key, value)
    except ValueError as error:
        raise ValueError(f"found {_shown(value)}, expected {error}{' or none' if key.none else ''}") from None
    if key.choices and result not in key.choices:
        raise ValueError(f"found {_shown(value)}, expected one of {', '.join(key.choices)}")
    if isinstance(result, int | float) and not isinstance(result, bool):
        if key.least is not None and result < key.least:
            raise ValueError(f"found {_shown(value)}, expected at least {_bound(key.least)}")
        if key.below is not None and result >= key.below:
            raise ValueError(f"found {_shown(value)}, expected less than {_bound(key.below)}")
        if isinstance(result, int) and result not in INTEGERS:
            raise ValueError(f"found {_shown(value)}, expected an integer of 64 bits")
    return result


def _bound(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _shown(value: ConfigValue) -> str:
    """A value in a message: a file may hold one of any length."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:80]}..."


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalised:
    """A node's config made canonical. ``settings`` are usable only where ``problems`` is empty."""

    config: Settings
    """Declared types, defaults left out: what the network's id is made of."""
    settings: Settings
    problems: tuple[tuple[str, str], ...]
    """The key that is wrong ('' = several of them), and what is wrong."""


def normalise_config(
    kind: NodeType, config: Mapping[str, ConfigValue], precision: str, param_precision: str = ""
) -> Normalised:
    """Convert strings, check every key, drop defaults, fill defaults into the settings.

    ``precision`` is that of the network's activations, ``param_precision`` that of its parameters ('' = the same). A value of
    ``None`` is an absent key.
    """
    keys = {key.name: key for key in (*kind.keys, *COMMON_KEYS)}
    problems: list[tuple[str, str]] = []
    given: dict[str, ConfigValue] = {}
    refused: set[str] = set()
    if len(config) > KEYS_MOST:
        text = f"config: found {len(config)} keys, expected at most {KEYS_MOST}"
        return Normalised(config={}, settings={}, problems=(("", text),))
    for name, value in config.items():
        key = keys.get(name)
        if key is None:
            expected = nearest(name, tuple(keys))
            problems.append((name, f"unknown config key: found {_shown(name)}, expected {expected}"))
            continue
        if value is None or (key.none and value == "none"):
            continue
        try:
            given[name] = _checked(key, value)
        except ValueError as error:
            refused.add(name)
            problems.append((name, f"config key {name!r}: {error}"))
    settings: dict[str, ConfigValue] = {key.name: given.get(key.name, key.default) for key in keys.values()}
    inherited = {"activation_precision": precision, "param_precision": param_precision or precision}
    for name, network in inherited.items():
        settings[name] = given.get(name) or given.get("precision") or network
    canonical: dict[str, ConfigValue] = {}
    for key in keys.values():
        default = key.default if key.derive is None else key.derive(settings)
        if settings[key.name] is None:
            settings[key.name] = default
        if settings[key.name] is None and key.required and key.name not in refused:
            problems.append((key.name, f"config key {key.name!r}: found nothing, expected {_described(key)}"))
        if key.name in given and given[key.name] != default:
            canonical[key.name] = given[key.name]
    for name in ("precision", *inherited):
        canonical.pop(name, None)
    canonical |= {name: settings[name] for name, network in inherited.items() if settings[name] != network}
    for name, other in (("colocate_policy", "colocate_group"), ("colocate_group", "colocate_policy")):
        # A group alone would bind nothing.
        if settings[name] is not None and settings[other] is None and other not in refused:
            problems.append((name, f"config key {name!r}: found it without {other}, expected both"))
    if not problems:
        problems.extend(("", text) for text in kind.check(settings))
    return Normalised(config=canonical, settings=settings, problems=tuple(problems))


def _described(key: Key) -> str:
    if key.choices:
        return f"one of {', '.join(key.choices)}"
    names = {"int": "an integer", "ints": "integers", "float": "a number", "bool": "true or false"}
    return names.get(key.kind, "a string")


def catalogue_digest() -> str:
    """sha256 of the catalogue's canonical description: a session records which catalogue computed it."""
    description = {
        "common": [_key_description(key) for key in COMMON_KEYS],
        "types": [
            {
                "name": kind.name,
                "aliases": list(kind.aliases),
                "inputs": kind.inputs,
                "orthogonalised": kind.orthogonalised,
                "keys": [_key_description(key) for key in kind.keys],
                "revision": kind.revision,
                "package": kind.package,
            }
            # By name, not in the order in which packages were found.
            for kind in sorted(_types.values(), key=lambda kind: kind.name)
        ],
    }
    return hashlib.sha256(json_bytes(description)).hexdigest()


def _key_description(key: Key) -> dict[str, ConfigValue | list[str]]:
    return {
        "name": key.name,
        "kind": key.kind,
        "default": key.default,
        "required": key.required,
        "derived": key.derive is not None,
        "choices": list(key.choices),
    }
