"""Network files: YAML to definition and back, with line and column for every complaint.

A file comes from anybody, so nothing of YAML's machinery is used but its events: they are turned into a tree of plain
mappings, sequences and texts, one event at a time. Anchors, aliases, tags and duplicate keys are refused, depth and size are
bounded, and no text is given a type before the key that it belongs to says which (so ``on`` and ``no`` are good ids, and
``1e-5`` is a number).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dcnr.config import LIMITS
from dcnr.errors import InvalidNetwork, UsageError
from dcnr.ids import VNodeId
from dcnr.network.analysis import MORE, Network, analyse
from dcnr.network.graph import UNSAID, CostSpec, Definition, Edge, InputSpec, MetricSpec, Node, OutputSpec, Position
from dcnr.network.types import cut, nearest, takes_text

_PRECISIONS = ("precision", "param_precision", "activation_precision")
_TOP = ("name", *_PRECISIONS, "inputs", "nodes", "edges", "outputs", "costs", "metrics")
_KEYS: Mapping[str, tuple[str, ...]] = {
    "inputs": ("name", "node_id", "slot_id", "column", "dtype", "shape"),
    "nodes": ("id", "type", "config", "input_shapes", "output_shapes"),
    "edges": ("from", "to", "from_slot", "to_slot"),
    "outputs": ("name", "node_id", "slot_id"),
    "costs": ("name", "node_id", "slot_id", "target", "weight"),
    "metrics": ("name", "type", "node_id", "slot_id"),
}
_Entry = TypeVar("_Entry")
_AT = re.compile(r"line (\d+)(?:, column (\d+))?: ")
_CONTROL = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that YAML does not allow; the parser refuses them without saying where."""
_NULLS = ("", "~", "null", "Null", "NULL")
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def load_network(source: Path | str) -> Definition:
    """The canonical definition of a file (a ``Path``) or of a text (a ``str``). Raises as :func:`load_analysed` does."""
    return load_analysed(source).definition


def load_analysed(source: Path | str) -> Network:
    """A file (a ``Path``) or text (a ``str``), analysed.

    Raises :class:`~dcnr.errors.InvalidNetwork` with all problems, in the order of lines, and :class:`~dcnr.errors.UsageError`
    where the file cannot be read.
    """
    file = source.name if isinstance(source, Path) else ""
    reading = _Reading(file)
    definition = reading.definition(_text(source))
    problems = reading.problems
    network: Network | None = None
    if definition is not None:
        try:
            network = analyse(definition)
        except InvalidNetwork as error:
            problems.extend(error.problems)
    if problems or network is None:
        raise InvalidNetwork(_sorted(problems, file))
    return network


def dump_network(definition: Definition) -> str:
    """A network file that loads to the same definition. Raises :class:`~dcnr.errors.InvalidNetwork`."""
    definition = analyse(definition).definition
    document: dict[str, Any] = {"name": definition.name, "precision": definition.precision}
    if definition.param_precision:
        document["param_precision"] = definition.param_precision
    document["inputs"] = [
        _Flow(name=i.name, node_id=i.node_id, slot_id=i.slot_id, column=i.column, dtype=i.dtype, shape=list(i.shape))
        for i in definition.inputs
    ]
    document["nodes"] = [_dumped_node(node) for node in definition.nodes]
    document["edges"] = [_dumped_edge(edge) for edge in definition.edges]
    document["outputs"] = [_Flow(name=o.name, node_id=o.node_id, slot_id=o.slot_id) for o in definition.outputs]
    document["costs"] = [
        _Flow(name=c.name, node_id=c.node_id, slot_id=c.slot_id, target=c.target, weight=float(c.weight))
        for c in definition.costs
    ]
    document["metrics"] = [
        _Flow(name=m.name, type=m.type, node_id=m.node_id, slot_id=m.slot_id) for m in definition.metrics
    ]
    present = {key: value for key, value in document.items() if value != []}
    written: str = yaml.dump(present, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 16)
    return written


# --- events to a tree --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Text:
    text: str
    plain: bool
    at: Position

    @property
    def null(self) -> bool:
        return self.plain and self.text in _NULLS


@dataclass(frozen=True, slots=True, kw_only=True)
class _List:
    items: list[_Tree]
    at: Position


@dataclass(frozen=True, slots=True, kw_only=True)
class _Map:
    entries: dict[str, _Tree]
    keys: dict[str, Position]
    at: Position


_Tree = _Text | _List | _Map


@dataclass(slots=True, kw_only=True)
class _Open:
    """A collection whose end has not come yet; ``key`` is what a mapping's next value belongs to."""

    made: _List | _Map
    key: _Text | None = None


class _Fatal(Exception):
    """Reading cannot go on after this; its problem has been noted."""


class _Reading:
    """One file: its tree, its definition, its problems."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[str] = []

    def definition(self, text: str) -> Definition | None:
        """``None`` where the text is no mapping at all; other problems are noted and read over."""
        try:
            if control := _CONTROL.search(text):
                line, column = (
                    text.count("\n", 0, control.start()),
                    control.start() - text.rfind("\n", 0, control.start()),
                )
                place = Position(file=self.file, line=line + 1, column=column)
                found = f"found malformed YAML (character {control[0]!r} is not allowed)"
                self._note(place, f"{found}, expected a network file")
                return None
            root = self._tree(text)
            if isinstance(root, _Map):
                return self._definition(root)
        except _Fatal:
            return None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            reason = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
            at = None if mark is None else self._position(mark)
            self._note(at, f"found malformed YAML ({reason}), expected a network file")
            return None
        self._note(None if root is None else root.at, "found no mapping, expected a network file")
        return None

    def _position(self, mark: Any) -> Position:
        return Position(file=self.file, line=mark.line + 1, column=mark.column + 1)

    def _note(self, at: Position | None, text: str) -> None:
        self.problems.append(cut(text if at is None else f"{at}: {text}"))
        if len(self.problems) >= LIMITS.network_problems:
            self.problems.append(MORE)
            raise _Fatal

    def _tree(self, text: str) -> _Tree | None:
        root: _Tree | None = None
        stack: list[_Open] = []
        documents = values = 0
        for event in yaml.parse(text, Loader=_LOADER):
            at = self._position(event.start_mark)
            made: _Tree
            match event:
                # Most events are these: they come first.
                case yaml.ScalarEvent():
                    if len(event.value) > LIMITS.network_text:
                        found = f"found a text of {len(event.value)} characters"
                        self._note(at, f"{found}, expected at most {LIMITS.network_text}")
                        raise _Fatal
                    made = _Text(text=event.value, plain=event.style is None, at=at)
                case yaml.DocumentStartEvent():
                    documents += 1
                    if documents > 1:
                        self._note(at, "found a second document, expected one")
                        raise _Fatal
                    continue
                case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                    stack.pop()
                    continue
                case yaml.AliasEvent():
                    self._note(at, f"found alias '*{event.anchor}', expected the value itself")
                    made = _Text(text="", plain=True, at=at)
                case yaml.SequenceStartEvent():
                    made = _List(items=[], at=at)
                case yaml.MappingStartEvent():
                    made = _Map(entries={}, keys={}, at=at)
                case _:
                    continue
            values += 1
            if values > LIMITS.network_values:
                self._note(at, f"found more than {LIMITS.network_values} values, expected fewer")
                raise _Fatal
            if not isinstance(event, yaml.AliasEvent):
                if event.anchor is not None:
                    self._note(at, f"found anchor '&{event.anchor}', expected none")
                if event.tag is not None:
                    self._note(at, f"found tag {event.tag!r}, expected none")
            if not stack:
                root = made
            else:
                self._place(stack[-1], made)
            if not isinstance(made, _Text):
                stack.append(_Open(made=made))
                if len(stack) > LIMITS.network_depth:
                    self._note(at, f"found nesting deeper than {LIMITS.network_depth}, expected less")
                    raise _Fatal
        return root

    def _place(self, into: _Open, made: _Tree) -> None:
        if isinstance(into.made, _List):
            into.made.items.append(made)
        elif into.key is None:
            if not isinstance(made, _Text):
                self._note(made.at, "found a collection as a key, expected a text")
                made = _Text(text="", plain=True, at=made.at)
            into.key = made
        else:
            if into.key.text in into.made.entries:
                self._note(into.key.at, f"found key {into.key.text!r} a second time, expected it once")
            into.made.entries.setdefault(into.key.text, made)
            into.made.keys.setdefault(into.key.text, into.key.at)
            into.key = None

    # --- the tree to a definition ---

    def _definition(self, root: _Map) -> Definition:
        self._known(root, "network file", _TOP)
        # One that is not given has the value of ``precision``, else that of the other.
        named = next((key for key in _PRECISIONS if key in root.entries), "precision")
        precision = self._string(root, named, "network file", "float32")
        return Definition(
            name=self._string(root, "name", "network file"),
            precision=self._string(root, "activation_precision", "network file", precision),
            param_precision=self._string(root, "param_precision", "network file", precision),
            inputs=tuple(self._read(root, "inputs", self._input)),
            nodes=tuple(self._read(root, "nodes", self._node)),
            edges=tuple(self._read(root, "edges", self._edge)),
            outputs=tuple(self._read(root, "outputs", self._output)),
            costs=tuple(self._read(root, "costs", self._cost)),
            metrics=tuple(self._read(root, "metrics", self._metric)),
        )

    def _read(self, root: _Map, key: str, read: Callable[[_Map], _Entry | None]) -> Iterator[_Entry]:
        """The entries of a top-level list, those that cannot be made sense of left out (and noted)."""
        listed = root.entries.get(key)
        if listed is None or (isinstance(listed, _Text) and listed.null):
            return
        if not isinstance(listed, _List):
            self._note(listed.at, f"{key}: found {_kind(listed)}, expected a list")
            return
        for item in listed.items:
            if not isinstance(item, _Map):
                self._note(item.at, f"{key}: found {_kind(item)}, expected a mapping")
                continue
            made = read(item)
            if made is not None:
                yield made

    def _node(self, entry: _Map) -> Node | None:
        where = self._where(entry, "nodes", "id", "node")
        vnode = self._required(entry, "id", where)
        kind = self._required(entry, "type", where)
        config = self._config(entry, where, kind or "")
        given = {key: self._shapes(entry, key, where) for key in ("input_shapes", "output_shapes")}
        if vnode is None or kind is None:
            return None
        written = entry.entries.get("config")
        places = {**entry.keys, **(written.keys if isinstance(written, _Map) else {})}
        return Node(id=VNodeId(vnode), type=kind, config=config, at=entry.at, places=places, **given)

    def _config(self, entry: _Map, where: str, kind: str) -> dict[str, str]:
        """Texts as they stand: the catalogue knows their types."""
        found = entry.entries.get("config")
        if found is None or (isinstance(found, _Text) and found.null):
            return {}
        if not isinstance(found, _Map):
            self._note(found.at, f"{where}: config: found {_kind(found)}, expected a mapping")
            return {}
        config: dict[str, str] = {}
        for key, value in found.entries.items():
            if isinstance(value, _List) and value.items and all(isinstance(item, _Text) for item in value.items):
                if takes_text(kind, key):
                    self._note(value.at, f"{where}: config key {key!r}: found a list, expected a text")
                    continue
                # The catalogue reads it as it reads the same list in quotes.
                config[key] = f"[{', '.join(item.text for item in value.items if isinstance(item, _Text))}]"
                continue
            if not isinstance(value, _Text):
                self._note(value.at, f"{where}: config key {key!r}: found {_kind(value)}, expected a single value")
            elif not value.null:
                config[key] = value.text
        return config

    def _edge(self, entry: _Map) -> Edge | None:
        where = self._where(entry, "edges", "from", "edge from")
        source, target = (self._required(entry, key, where) for key in ("from", "to"))
        source_slot, target_slot = (self._integer(entry, key, where) for key in ("from_slot", "to_slot"))
        if source is None or target is None:
            return None
        return Edge(
            source=VNodeId(source),
            source_slot=source_slot,
            target=VNodeId(target),
            target_slot=target_slot,
            at=entry.at,
        )

    def _input(self, entry: _Map) -> InputSpec | None:
        where = self._where(entry, "inputs", "name", "input")
        vnode = self._required(entry, "node_id", where)
        made = InputSpec(
            name=self._string(entry, "name", where),
            node_id=VNodeId(vnode or ""),
            slot_id=self._integer(entry, "slot_id", where),
            column=self._string(entry, "column", where),
            dtype=self._string(entry, "dtype", where),
            shape=self._shape(entry.entries["shape"], f"{where}: shape") if "shape" in entry.entries else UNSAID,
            at=entry.at,
        )
        return None if vnode is None else made

    def _output(self, entry: _Map) -> OutputSpec | None:
        where = self._where(entry, "outputs", "name", "output")
        name, vnode, slot = self._end(entry, where)
        return None if vnode is None else OutputSpec(name=name, node_id=vnode, slot_id=slot, at=entry.at)

    def _cost(self, entry: _Map) -> CostSpec | None:
        where = self._where(entry, "costs", "name", "cost")
        name, vnode, slot = self._end(entry, where)
        target = self._string(entry, "target", where)
        weight = self._number(entry, "weight", where, 1.0)
        if vnode is None:
            return None
        return CostSpec(name=name, node_id=vnode, slot_id=slot, target=target, weight=weight, at=entry.at)

    def _metric(self, entry: _Map) -> MetricSpec | None:
        where = self._where(entry, "metrics", "name", "metric")
        name, vnode, slot = self._end(entry, where)
        kind = self._string(entry, "type", where)
        return None if vnode is None else MetricSpec(name=name, type=kind, node_id=vnode, slot_id=slot, at=entry.at)

    def _end(self, entry: _Map, where: str) -> tuple[str, VNodeId | None, int]:
        vnode = self._required(entry, "node_id", where)
        slot = self._integer(entry, "slot_id", where)
        return self._string(entry, "name", where), None if vnode is None else VNodeId(vnode), slot

    # --- single values ---

    def _known(self, entry: _Map, where: str, known: tuple[str, ...]) -> None:
        for key, at in entry.keys.items():
            if key not in known:
                self._note(at, f"{where}: unknown key: found {key!r}, expected {nearest(key, known)}")

    def _where(self, entry: _Map, section: str, name_key: str, word: str) -> str:
        """What messages call an entry; its keys are checked on the way."""
        name = entry.entries.get(name_key)
        where = f"{word} {name.text!r}" if isinstance(name, _Text) else word
        self._known(entry, where, _KEYS[section])
        return where

    def _string(self, entry: _Map, key: str, where: str, default: str = "") -> str:
        found = entry.entries.get(key)
        if found is None:
            return default
        if not isinstance(found, _Text):
            self._note(found.at, f"{where}: {key}: found {_kind(found)}, expected a text")
            return default
        return found.text

    def _required(self, entry: _Map, key: str, where: str) -> str | None:
        if key not in entry.entries:
            self._note(entry.at, f"{where}: {key}: found nothing, expected a text")
            return None
        return self._string(entry, key, where)

    def _integer(self, entry: _Map, key: str, where: str) -> int:
        found = entry.entries.get(key)
        return 0 if found is None else self._whole(found, f"{where}: {key}")

    def _whole(self, found: _Tree, where: str) -> int:
        if isinstance(found, _Text) and len(found.text) <= 20 and found.text.isascii():
            digits = found.text.removeprefix("-")
            if digits.isdecimal():
                return int(found.text)
        self._note(found.at, f"{where}: found {_kind(found)}, expected an integer")
        return 0

    def _number(self, entry: _Map, key: str, where: str, default: float) -> float:
        found = entry.entries.get(key)
        if found is None:
            return default
        if isinstance(found, _Text) and "_" not in found.text:
            try:
                return float(found.text)
            except ValueError:
                pass
        self._note(found.at, f"{where}: {key}: found {_kind(found)}, expected a number")
        return default

    def _shape(self, found: _Tree, where: str) -> tuple[int, ...]:
        if not isinstance(found, _List):
            self._note(found.at, f"{where}: found {_kind(found)}, expected a list of integers")
            return ()
        return tuple(self._whole(item, where) for item in found.items)

    def _shapes(self, entry: _Map, key: str, where: str) -> tuple[tuple[int, ...], ...] | None:
        found = entry.entries.get(key)
        if found is None or (isinstance(found, _Text) and found.null):
            return None
        if not isinstance(found, _List):
            self._note(found.at, f"{where}: {key}: found {_kind(found)}, expected a list of shapes")
            return None
        return tuple(self._shape(item, f"{where}: {key}") for item in found.items)


def _kind(found: _Tree) -> str:
    match found:
        case _Text(text=text):
            return repr(text) if len(text) <= 60 else repr(text[:60]) + ".."
        case _List():
            return "a list"
        case _Map():
            return "a mapping"


def _sorted(problems: list[str], file: str) -> list[str]:
    """In the order of the file. Problems without a position come first: they are about the whole file, which they name."""
    prefix = f"{file}, " if file else ""

    def place(problem: str) -> tuple[int, int]:
        if problem.endswith(MORE):
            return (LIMITS.definition_bytes, 0)
        found = _AT.match(problem.removeprefix(prefix))
        return (int(found[1]), int(found[2] or 0)) if found else (0, 0)

    named = (p if p.startswith(f"{prefix}line ") else f"{file}: {p}" for p in problems)
    return sorted(named if file else problems, key=place)


def _text(source: Path | str) -> str:
    """The whole text, never more of it than the limit and a byte."""
    name = ""
    if isinstance(source, str):
        # A lone surrogate is no text; as bytes it is refused below like any other byte that is no UTF-8.
        data = source.encode(errors="surrogatepass")
    else:
        name = source.name
        try:
            with source.open("rb") as file:
                data = file.read(LIMITS.definition_bytes + 1)
        except OSError as error:
            raise UsageError(f"cannot read network file {source}: {error.strerror or error}") from error
    if len(data) > LIMITS.definition_bytes:
        found = f"found more than {LIMITS.definition_bytes} bytes, expected at most that many in a network file"
        raise InvalidNetwork([f"{name}: {found}" if name else found])
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        before = data[: error.start]
        column = len(before[before.rfind(b"\n") + 1 :].decode()) + 1
        at = Position(file=name, line=before.count(b"\n") + 1, column=column)
        raise InvalidNetwork([f"{at}: found bytes that are not UTF-8, expected a text"]) from error


# --- writing -----------------------------------------------------------------------------------------------


class _Flow(dict[str, Any]):
    """A mapping that is written on one line."""


class _Shapes(list[Any]):
    """A list that is written on one line."""


class _Dumper(_DUMPER):  # type: ignore[misc]
    """Writes repeated values in full: anchors and aliases are refused on reading."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _flow_mapping(dumper: Any, data: _Flow) -> Any:
    return dumper.represent_mapping("tag:yaml.org,2002:map", data.items(), flow_style=True)


def _flow_sequence(dumper: Any, data: _Shapes) -> Any:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


_Dumper.add_representer(_Flow, _flow_mapping)
_Dumper.add_representer(tuple, _flow_sequence)
_Dumper.add_representer(_Shapes, _flow_sequence)


def _dumped_node(node: Node) -> dict[str, Any]:
    written: dict[str, Any] = {"id": node.id, "type": node.type}
    if node.config:
        written["config"] = _Flow(node.config)
    for key, shapes in (("input_shapes", node.input_shapes), ("output_shapes", node.output_shapes)):
        if shapes is not None:
            written[key] = _Shapes(list(shape) for shape in shapes)
    return written


def _dumped_edge(edge: Edge) -> _Flow:
    written = _Flow({"from": edge.source, "to": edge.target})
    if edge.source_slot:
        written["from_slot"] = edge.source_slot
    if edge.target_slot:
        written["to_slot"] = edge.target_slot
    return written
