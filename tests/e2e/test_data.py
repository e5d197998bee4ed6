"""Data of every kind, from files to rows in a running session, and away again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import dcnr
from dcnr.adapters.text import load_tokenizer
from dcnr.adapters.yaml_network import dump_network
from dcnr.cli.main import app
from dcnr.client.blocking import Client
from dcnr.errors import UsageError
from dcnr.oracle import Trainer
from dcnr.protocol.messages import RowsRef
from dcnr.runtime.supervisor import LocalNetwork
from dcnr.session.dataset import Manifest, shard_key, tokenizer_key
from dcnr.session.events import Evaluated, StepDone
from dcnr.session.record import Record

STEPS = 6
RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 8)).astype(np.float32)
Y = (X.sum(axis=1) > 0).astype(np.int64)
SIZES = ["--batch-size", "8", "--microbatches", "2", "--checkpoint-every", "2"]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalNetwork]:
    with LocalNetwork(tmp_path_factory.mktemp("network"), 2, 1) as network:
        yield network


@pytest.fixture
def client(local: LocalNetwork) -> Iterator[Client]:
    with dcnr.connect(local.address) as connected:
        yield connected


@pytest.fixture
def run(local: LocalNetwork) -> Any:
    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(a) for a in arguments], env={"DCNR_NETWORK": local.address})

    return invoke


def classifier() -> dcnr.Graph:
    g = dcnr.Graph("classifier")
    h = g.relu(g.linear(g.input("features", [8], "float32"), out_dim=16))
    g.cost("ce_logits", g.linear(h, out_dim=2), target="y")
    return g


def lines(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_columns_from_files_train_as_the_same_arrays_do_in_one_process(
    run: Any, client: Client, tmp_path: Path
) -> None:
    """The input names no column of the files, and so takes the first."""
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "y.npy", Y)
    (tmp_path / "net.yaml").write_text(classifier().to_yaml())
    (added,) = lines(run("data", "add", tmp_path / "x.npy", tmp_path / "y.npy", "--split", "0.2", "--json"))
    (shown,) = lines(run("data", "show", added["dataset"], "--json"))
    assert shown["columns"] == [
        {"name": "x", "dtype": "float32", "shape": [8]},
        {"name": "y", "dtype": "int64", "shape": []},
    ]
    assert shown["train"] + shown["validation"] == 120
    assert 8 < shown["validation"] < 48
    for_people = run("data", "show", added["dataset"]).stdout
    assert f"{shown['train']} rows" in for_people
    assert "KiB in 4 shards" in for_people

    _, *events = lines(
        run("train", tmp_path / "net.yaml", "--data", added["dataset"], "--steps", STEPS, *SIZES, "--lr", "0.01",
            "--eval-every", "2", "--json")
    )  # fmt: skip
    assert any(e["event"] == "evaluated" for e in events)
    session = client.session(client.sessions()[-1].session)
    files = session.files()
    record = Record.from_bytes(files.record)
    columns = client.columns(
        RowsRef(
            dataset=record.dataset,
            split="train",
            context=0,
            rows=tuple(range(record.rows_train)),
            columns=("features", "y"),
            token=files.rows_token,
        )
    )
    # One process reads arrays of other names as the session does: what is not found is the first.
    oracle = Trainer(classifier(), record.recipe, {"first": columns["features"], "y": columns["y"]})
    losses = [oracle.step().loss for _ in range(STEPS)]
    assert [e["loss"] for e in events if e["event"] == "step_done"] == losses
    # Every row is one of the rows that were given, on one side only.
    assert {row.tobytes() for row in columns["features"]} < {row.tobytes() for row in X}


@pytest.mark.parametrize("kind", ["columns", "text"])
def test_a_cost_may_ignore_any_value(local: LocalNetwork, client: Client, kind: str, tmp_path: Path) -> None:
    """What datasets do not count beforehand: the blank of text, the class 0 of columns; -100 in another column is one more."""
    g = dcnr.Graph(f"ignoring-{kind}")
    hidden = g.embedder(g.input("tokens", [8], "int64"), vocab_size=256, dim=16)
    g.cost("ce_logits", g.linear(hidden, out_dim=256), target="targets", ignore_index=ord(" ") if kind == "text" else 0)
    if kind == "columns":
        g.cost("ce_logits", g.linear(hidden, out_dim=256), target="others", id="other")
        tokens = RNG.integers(0, 4, size=(60, 9))
        others = np.where(RNG.random((60, 8)) < 0.5, -100, 7)
        columns = {"tokens": tokens[:, :-1].copy(), "targets": tokens[:, 1:].copy(), "others": others}
        # Given arrays hold nothing out.
        with pytest.raises(UsageError, match=r"eval every 3: dataset .* holds 0 rows out for validation"):
            client.train(g, columns, steps=6, batch_size=8, microbatches=4, eval_every=3)
        training = client.train(g, columns, steps=6, batch_size=8, microbatches=4)
    else:
        words = "".join(RNG.choice(["a", "bc", "def", " "], size=4000))
        (tmp_path / "words.txt").write_text(words)
        training = client.train(
            g, str(tmp_path / "words.txt"), tokenizer="bytes", steps=6, batch_size=8, microbatches=4, eval_every=3
        )
    evaluated = [event for event in training if isinstance(event, Evaluated)]
    files = training.files()
    record = Record.from_bytes(files.record)
    assert record.valid_targets_per_row == -1

    def rows(split: str, count: int) -> dict[str, np.ndarray[Any, Any]]:
        return client.columns(
            RowsRef(
                dataset=record.dataset,
                split=split,
                context=record.context,
                rows=tuple(range(count)),
                columns=("tokens", *(cost.target for cost in g.definition().costs)),
                token=files.rows_token,
            )
        )

    oracle = Trainer(g, record.recipe, rows("train", record.rows_train))
    assert training.losses == {result.step: result.loss for result in (oracle.step() for _ in range(6))}
    if kind == "text":
        held = rows("validation", min(4 * 8, record.rows_validation))
        assert (held["targets"] == ord(" ")).any()
        assert evaluated[-1].step == 6
        assert evaluated[-1].loss == pytest.approx(oracle.loss(held), rel=1e-6)


def test_ignored_positions_count_in_no_step(local: LocalNetwork, client: Client) -> None:
    """The mean of a step is over the targets that count, which are known row by row; also once resumed."""
    tokens = RNG.integers(0, 64, size=(60, 9))
    targets = tokens[:, 1:].copy()
    for row, length in enumerate(RNG.integers(0, 9, size=60)):
        targets[row, length:] = -100
    columns = {"tokens": tokens[:, :-1].copy(), "targets": targets}
    model = dcnr.templates.gpt(layers=1, dim=16, heads=2, vocab=64, context=8)
    training = client.train(
        model, columns, steps=30, batch_size=8, microbatches=4, optimizer=dcnr.AdamW(lr=1e-2), checkpoint_every=5
    )
    for event in training:
        if isinstance(event, StepDone) and event.step == 7:
            training.stop()
            break
    training.resume()
    assert max(event.step for event in training if isinstance(event, StepDone)) == 30
    oracle = Trainer(model, Record.from_bytes(training.files().record).recipe, columns)
    assert training.losses == {result.step: result.loss for result in (oracle.step() for _ in range(30))}
    hashes = {vnode: hashlib.sha256(data).hexdigest() for vnode, data in oracle.state_objects().items()}
    assert {vnode: state.sha256 for vnode, state in training.manifest(training.files()).states.items()} == hashes


def test_columns_that_do_not_fit_are_refused_and_leave_nothing(run: Any, client: Client, tmp_path: Path) -> None:
    (tmp_path / "net.yaml").write_text(classifier().to_yaml())
    np.savez(tmp_path / "wide.npz", x=X.astype(np.float64), y=Y)
    before = (client.datasets(), client.sessions())
    result = run("train", tmp_path / "net.yaml", "--data", tmp_path / "wide.npz", "--steps", "1", *SIZES)
    assert result.exit_code == 1
    assert "found column 'x' of float64 [8], expected float32 [8]" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    # A dataset that exists already is refused at the other end, in the same words.
    (added,) = lines(run("data", "add", tmp_path / "wide.npz", "--json"))
    again = run("train", tmp_path / "net.yaml", "--data", added["dataset"], "--steps", "1", *SIZES)
    assert again.stderr == result.stderr
    lines(run("data", "delete", added["dataset"], "--json"))
    assert (client.datasets(), client.sessions()) == before


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b"", "empty"),
        ("binary.txt", b"\x89PNG\xff" * 9, "18 sequences of bytes are no UTF-8, the first at byte 0"),
        ("ragged.csv", b"a,b\n1,2\n3\n", "line 3: found 1 fields, expected 2"),
        ("words.csv", b"a,b\n1,two\n", "line 2, column 'b': found 'two', expected a number"),
        ("none.csv", b"a,b\n", "no rows"),
        ("broken.npz", b"PK\x03\x04", "cannot be read"),
        ("broken.parquet", b"PAR1", "cannot be read"),
    ],
)
def test_bad_files_are_one_clear_line(run: Any, tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    result = run("data", "add", tmp_path / name, "--tokenizer", "bytes")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert said in line
    assert Path(name).stem in line


def test_whole_numbers_of_a_csv_fit_real_inputs_if_asked_to(run: Any, tmp_path: Path) -> None:
    """The refusal says how."""
    (tmp_path / "net.yaml").write_text(dump_network(dcnr.templates.mlp(2, [4], 1).definition()))
    (tmp_path / "whole.csv").write_text("x.0,x.1,y.0\n" + "1,2,3\n4,5,6\n" * 20)
    training = ["train", tmp_path / "net.yaml", "--steps", "1", *SIZES]
    refused = run(*training, "--data", tmp_path / "whole.csv")
    assert refused.exit_code == 1
    assert "found column 'x' of int64 [2], expected float32 [2]" in refused.stderr
    assert "add it with --dtype x=float32" in refused.stderr
    add = ["data", "add", tmp_path / "whole.csv", "--json"]
    assert "expected 'x'" in run(*add, "--dtype", "xx=float32").stderr
    (added,) = lines(run(*add, "--dtype", "x=float32,y=float32"))
    assert lines(run(*training, "--data", added["dataset"], "--json"))[-1]["event"] == "finished"


def test_invalid_text_can_be_replaced(run: Any, tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_bytes("na\xefve caf\xe9 ".encode("latin-1") * 99)
    options = ["data", "add", tmp_path / "old.txt", "--tokenizer", "bytes", "--json"]
    assert "198 sequences" in run(*options).stderr
    result = run(*options, "--invalid-utf8", "replace")
    assert "198 byte sequences" in result.stderr
    (added,) = lines(result)
    assert added["replaced"] == 198
    assert lines(run("data", "show", added["dataset"], "--json"))[0]["replaced"] == 198


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:280"])
def test_text_comes_back_from_the_store_as_it_was(
    run: Any, local: LocalNetwork, client: Client, tmp_path: Path, tokenizer: str
) -> None:
    dirty = "\ufeffa\u2028b\u2029c\u0085d\fe\vf\rg\r\nh\n\0i <|endoftext|> 深度学习 👩‍👩‍👧 e\u0301  \t" * 40
    (tmp_path / "dirty.txt").write_bytes(dirty.encode())
    (added,) = lines(run("data", "add", tmp_path / "dirty.txt", "--tokenizer", tokenizer, "--split", "0", "--json"))
    manifest = Manifest.from_bytes(client.dataset(added["dataset"])[1])
    assert manifest.tokenizer is not None
    store = local.home / "store"
    tokens = b"".join((store / shard_key(shard.sha256)).read_bytes() for shard in manifest.train.shards[0])
    decoder = load_tokenizer((store / tokenizer_key(manifest.tokenizer.sha256)).read_bytes())
    assert decoder.raw(np.frombuffer(tokens, dtype="<u2").tolist()) == dirty.encode()
    assert "targets" in run("data", "show", added["dataset"]).stdout


def test_labels_are_shifted_once(client: Client, tmp_path: Path) -> None:
    """Each letter has one successor: a network that has seen the right one continues the alphabet."""
    (tmp_path / "alphabet.txt").write_text("abcdefghijklmnopqrstuvwxyz" * 200)
    model = dcnr.templates.gpt(layers=1, dim=32, heads=2, vocab=256, context=16)
    trained = client.train(
        model,
        str(tmp_path / "alphabet.txt"),
        tokenizer="bytes",
        steps=100,
        batch_size=8,
        microbatches=2,
        optimizer=dcnr.AdamW(lr=1e-2),
        checkpoint_every=20,
    )
    losses = [event.loss for event in trained if isinstance(event, StepDone)]
    assert losses[-1] < 0.1 < losses[0]
    assert "".join(trained.generate("abcd", max_tokens=24, temperature=0.0)) == "efghijklmnopqrstuvwxyzab"


def test_data_in_use_stay_and_what_was_deleted_can_be_added_again(run: Any, client: Client, tmp_path: Path) -> None:
    training = client.train(classifier(), {"x": X, "y": Y}, steps=100_000, batch_size=8, microbatches=2)
    dataset = training.info().dataset
    refused = run("data", "delete", "columns")
    assert refused.exit_code == 1
    assert f"read by session {training.id}" in refused.stderr
    assert f"dcnr session stop {training.id}" in refused.stderr
    training.stop()
    assert run("data", "delete", dataset[:12]).stdout == f"deleted {dataset}\n"
    assert dataset not in [d for d, _ in client.datasets()]
    gone = run("session", "resume", training.id)
    assert gone.exit_code != 0
    assert f"its dataset {dataset[:12]} was deleted" in gone.stderr
    nobody = run("data", "delete", dataset)
    assert (nobody.exit_code, "dcnr data list" in nobody.stderr) == (2, True)
    assert client.add_data({"x": X, "y": Y}) == dataset
    training.resume()
    training.stop()
