"""Network files from anybody: never anything but InvalidNetwork, and never more memory than the file explains."""

from __future__ import annotations

import contextlib
import json
import tempfile
import tracemalloc
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcnr.adapters.yaml_network import load_network
from dcnr.config import LIMITS
from dcnr.errors import InvalidNetwork
from dcnr.network import templates
from dcnr.network.analysis import MORE, Network, analyse
from dcnr.network.graph import canonical_json, from_canonical_json
from dcnr.network.types import ALIKE_LENGTH_MOST, COMPARED_MOST, NAMED_MOST, PROBLEM_MOST
from tests.network.test_yaml_network import FILE

EXAMPLE = (Path(__file__).parents[2] / "examples" / "gpt-demo.yaml").read_text()


def peak_bytes(work: Callable[[], object]) -> int:
    """Most memory that Python held at once while ``work`` ran, beyond what it held before."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refused(text: str) -> tuple[str, ...]:
    with pytest.raises(InvalidNetwork) as caught:
        load_network(text)
    return caught.value.problems


# --- bounded work ------------------------------------------------------------------------------------------


def bomb() -> str:
    """A billion laughs: nine of the level below, twelve levels."""
    lines = ["name: &a0 [lol, lol]"]
    lines += [f"k{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (bomb(), "line 1, column 7: found anchor '&a0', expected none"),
        (FILE.replace('dim: "4"', 'dim: "1000000000000"'), "expected less than"),
        (FILE.replace("[[6, 4]]", "[[1000000000000, 4]]"), "output_shapes: found [[1000000000000, 4]], expected [[6, 4]]"),
        (FILE.replace("- {name: logits,", "- {name: logits, deep: " + "[" * 40 + "]" * 40 + ","), "nesting deeper than 32"),
        (f"name: {'x' * 1001}\n" + FILE, "found a text of 1001 characters, expected at most 1000"),
    ],
    ids=["bomb", "dim", "shape", "depth", "text"],
)  # fmt: skip
def test_refused_in_a_megabyte(text: str, expected: str) -> None:
    found: list[str] = []
    assert peak_bytes(lambda: found.extend(refused(text))) < 1 << 20
    assert any(expected in problem for problem in found), found


def test_a_file_over_the_limit_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "long.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 30)

    def load() -> None:
        with pytest.raises(InvalidNetwork, match=r"^long.yaml: found more than 4194304 bytes"):
            load_network(path)

    assert peak_bytes(load) < 3 * LIMITS.definition_bytes


def test_a_file_of_values_alone_is_read_to_the_bound() -> None:
    text = "a: [" + "x," * LIMITS.network_values + "]"

    def load() -> None:
        (found,) = refused(text)
        assert found == f"line 1, column {2 * LIMITS.network_values - 1}: found more than 500000 values, expected fewer"

    assert peak_bytes(load) < 200 << 20


def chain(count: int, edges: str) -> str:
    text = "name: long\ninputs: [{name: x, node_id: n0, shape: [4]}]\nnodes:\n"
    return text + "".join(f"- {{id: n{i}, type: relu}}\n" for i in range(count)) + "edges:\n" + edges


def test_ten_thousand_nodes_and_not_one_more() -> None:
    count = LIMITS.network_nodes
    text = chain(count, "".join(f"- {{from: n{i}, to: n{i + 1}}}\n" for i in range(count - 1)))
    assert peak_bytes(lambda: load_network(text)) < 100 << 20
    assert refused(text.replace("edges:", "- {id: more, type: relu}\nedges:")) == (
        "nodes: found 10001, expected at most 10000",
    )


def test_a_long_cycle_is_named_shortly() -> None:
    count = LIMITS.network_nodes
    found = refused(chain(count, "".join(f"- {{from: n{i}, to: n{(i + 1) % count}}}\n" for i in range(count))))
    cycle = next(problem for problem in found if "cycle" in problem)
    assert cycle.startswith("line 4, column 3: node 'n0': found a cycle: 'n0' (line 4) -> 'n1' (line 5) -> ")
    assert cycle.endswith(" -> 'n0', expected none")
    assert len(cycle) < 1000


def test_of_many_problems_the_first_are_told_and_that_there_are_more() -> None:
    found = refused("name: x\nnodes:\n" + "".join(f"- {{id: n{i}, type: lineer}}\n" for i in range(2000)))
    assert len(found) == LIMITS.network_problems + 1
    assert (
        found[0]
        == "line 3, column 12: node 'n0': unknown type: found 'lineer', expected 'linear', or the package that has it on every peer"
    )
    assert found[-1] == MORE


def test_the_nearest_name_is_searched_for_the_first_unknown_names_only() -> None:
    found = refused(chain(100, "".join(f"- {{from: nn{i}, to: n1}}\n" for i in range(50))))
    assert sum("expected 'n" in problem for problem in found if "no such node" in problem) == NAMED_MOST
    assert sum("no such node" in problem for problem in found) == 50


def test_a_name_is_compared_in_full_with_few_and_never_with_long_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparing two texts takes time that grows with both lengths: 10,000 ids of 900 characters would take minutes."""
    compared: list[Sequence[str]] = []

    def counted(word: str, possibilities: Sequence[str], n: int) -> list[str]:
        compared.append(possibilities)
        return get_close_matches(word, possibilities, n)

    monkeypatch.setattr("dcnr.network.types.difflib.get_close_matches", counted)

    def search(length: int) -> tuple[str, ...]:
        lines = [f"- {{id: '{i:0{length}d}', type: relu}}\n" for i in range(500)]
        edges = [f"- {{from: '{i:x>{length}d}', to: '{0:0{length}d}'}}\n" for i in range(50)]
        return refused("name: x\nnodes:\n" + "".join(lines) + "edges:\n" + "".join(edges))

    assert "expected the id of a node" in search(ALIKE_LENGTH_MOST + 1)[-1]
    assert compared == []
    search(ALIKE_LENGTH_MOST)
    assert [len(known) for known in compared] == [COMPARED_MOST] * NAMED_MOST


def on_the_wire(change: Callable[[Any], None]) -> Network:
    """What an orchestrator does with a definition, after a change of its JSON."""
    document = json.loads(canonical_json(load_network(FILE)))
    change(document)
    return analyse(from_canonical_json(json.dumps(document).encode()))


TEXTS: list[tuple[str, ...]] = [
    ("name",), ("precision",), ("nodes", "id"), ("nodes", "type"), ("edges", "from"), ("edges", "to"), ("inputs", "name"),
    ("inputs", "node_id"), ("inputs", "column"), ("inputs", "dtype"), ("outputs", "name"), ("outputs", "node_id"),
    ("costs", "name"), ("costs", "node_id"), ("costs", "target"), ("metrics", "name"), ("metrics", "node_id"),
    ("metrics", "type"), ("nodes", "config", "shared_weight_alias"), ("nodes", "config", "colocate_group"),
]  # fmt: skip


@pytest.mark.parametrize("path", TEXTS, ids=".".join)
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x" * 1_000_000, "of 1000000 characters, expected at most 1000"),
        ("\x1b[2J evil\n", r"found '\x1b[2J evil\n', expected printable characters"),
    ],
    ids=["long", "escapes"],
)
def test_every_text_is_short_and_printable(path: tuple[str, ...], text: str, expected: str) -> None:
    """Also where no file was read: a definition comes over the wire."""

    def change(document: Any) -> None:
        place = document
        for key in path[:-1]:
            place = place[key][0] if isinstance(place[key], list) else place[key]
        place[path[-1]] = text

    with pytest.raises(InvalidNetwork) as caught:
        on_the_wire(change)
    assert any(expected in problem for problem in caught.value.problems), caught.value.problems[:3]
    assert all(problem.isprintable() for problem in caught.value.problems)
    assert len(str(caught.value)) < 20_000


def test_problems_that_quote_long_texts_lose_their_middle() -> None:
    """Twenty aliases of 1,000 characters are quoted at every tie that has another."""
    owners = [
        f"- {{id: n{i}, type: linear, config: {{in_dim: 4, out_dim: 4, shared_weight_alias: {i:x>1000d}}}}}\n"
        for i in range(NAMED_MOST)
    ]
    ties = [
        f"- {{id: t{i}, type: linear, config: {{in_dim: 4, out_dim: 4, tie_weight_alias: y}}}}\n" for i in range(300)
    ]
    found = [p for p in refused("name: x\nnodes:\n" + "".join(owners + ties)) if "tie_weight_alias 'y'" in p]
    assert len(found) == 300
    assert all(len(problem) < PROBLEM_MOST + 10 for problem in found)
    assert found[0].startswith("line 23, column 58: node 't0': found tie_weight_alias 'y', expected 'xxx")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["costs"][0].update(weight=10**400), "found int, expected a number with a point"),
        (lambda d: d["costs"][0].update(weight=1), "found int, expected a number with a point"),
        (lambda d: d["costs"][0].update(weight=True), "found bool, expected a number with a point"),
        (lambda d: d.update(name="\ud800"), "surrogates not allowed"),
        (lambda d: d["nodes"][0].update(config=[[1, 2]]), "found list, expected a mapping"),
        (lambda d: d["inputs"][0].update(shape=[10**4000, 10**4000]), "found an integer of 13288 bits"),
        (lambda d: d["nodes"][0]["config"].update(dim=10**4000), "found an integer of 13288 bits"),
    ],
)
def test_what_no_definition_on_the_wire_has(change: Callable[[Any], None], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        on_the_wire(change)


def test_sizes_that_are_refused_are_multiplied_with_no_others() -> None:
    """Their product would have more digits than Python prints."""
    document = json.loads(canonical_json(templates.mlp(2, [2], 1).definition()))
    document["nodes"].append({"id": "flat", "type": "flatten", "config": {}})
    document["inputs"].append({**document["inputs"][0], "name": "f", "node_id": "flat", "shape": [2**62] * 300})
    with pytest.raises(InvalidNetwork, match=r"node 'flat': found input 'f' of shape .* expected sizes of 1 to"):
        analyse(from_canonical_json(json.dumps(document).encode()))


# --- anything at all ---------------------------------------------------------------------------------------

TOKENS = st.sampled_from(
    ["&a ", "*a", "!!python/object/apply:os.system ", "? ", ": ", "- ", "---\n", "...\n", "[", "]", "{", "}", "|\n", ">\n", "'", '"', "#", "%YAML 1.1\n", "<<: ", "\n", "\t", "  ", "\x00", "\x85", "\u2028", "\ufeff", "~", "null", "-1", "1e999", ".nan", "0x10", "1000000000000", "9" * 30, "loss", "embedder", "broadcast", "num_outputs: 65536", "\N{PILE OF POO}"]
)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, text: str) -> str:
    """``text`` after a few edits: a piece cut out, doubled, moved, or a token put in."""
    for _ in range(draw(st.integers(1, 6))):
        first, second, third = sorted(draw(st.integers(0, len(text))) for _ in range(3))
        match draw(st.sampled_from(["cut", "double", "move", "insert", "replace"])):
            case "cut":
                text = text[:first] + text[min(second, first + 40) :]
            case "double":
                text = text[:second] + text[first:second][:200] + text[second:]
            case "move":
                text = text[:first] + text[second:third] + text[first:second] + text[third:]
            case "insert":
                text = text[:first] + draw(TOKENS) + text[first:]
            case _:
                text = text[:first] + draw(TOKENS) + text[first + 1 :]
    return text


def accepted_or_refused(data: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        path = Path(file.name)
        path.write_bytes(data)
        problems: tuple[str, ...] = ()
        try:
            definition = load_network(path)
        except InvalidNetwork as error:
            problems = error.problems or ("",)
        else:
            assert analyse(definition).definition == definition
        assert all(problem.startswith(path.name) for problem in problems), problems


@settings(max_examples=200)
@given(st.binary(max_size=400))
def test_random_bytes(data: bytes) -> None:
    accepted_or_refused(data)


@settings(max_examples=300)
@given(st.one_of(mutated(FILE), mutated(EXAMPLE)))
def test_mutated_files(text: str) -> None:
    accepted_or_refused(text.encode(errors="surrogatepass"))


@settings(max_examples=100)
@given(st.text(st.characters(), max_size=100))
def test_random_text(text: str) -> None:
    refused(text)


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**30, -(10**400), 10**4000, 2**63 - 1, -1])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["x" * 1001, "\x1b[2J", "\ud800", "1_0", "1" * 300, "\u2028"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300)
@given(st.data())
def test_mutated_definitions_on_the_wire(data: st.DataObject) -> None:
    """What the orchestrator catches when it reads a submitted definition, and nothing else."""
    document: Any = json.loads(canonical_json(load_network(FILE)))
    place: Any = document
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else list(range(len(place)))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            place[key] = data.draw(JSON)
            break
        place = place[key]
    try:
        definition = from_canonical_json(json.dumps(document).encode())
    except (KeyError, TypeError, ValueError):
        return
    with contextlib.suppress(InvalidNetwork):
        assert from_canonical_json(canonical_json(analyse(definition).definition)) is not None


@pytest.mark.parametrize("text", ["[" * 100_000, "3", "null", '{"name": "\\ud800"}', "\ud800"])
def test_no_definition_on_the_wire(text: str) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        from_canonical_json(text.encode(errors="surrogatepass"))
