"""Preparing data on the client: files and arrays in, shards and a manifest out."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcnr.adapters import text as text_module
from dcnr.adapters.text import (
    PreparedDataset,
    Tokenizer,
    byte_tokenizer,
    load_tokenizer,
    prepare_columns,
    prepare_text,
    python_corpus,
    train_tokenizer,
)
from dcnr.errors import InvalidData, NotInThisVersion, UnknownName, UsageError
from dcnr.session.dataset import Manifest, shard_key, tokenizer_key

SAMPLE = Path(__file__).read_text() + "print('häßlich', argument)  # 日本語 🙂\n"
TRAINED = train_tokenizer([SAMPLE], 400)


def manifest_of(prepared: PreparedDataset) -> Manifest:
    return Manifest.from_bytes(prepared.manifest)


def tokens_of(prepared: PreparedDataset, split: str) -> list[int]:
    manifest = manifest_of(prepared)
    data = b"".join(prepared.objects[shard_key(s.sha256)] for s in manifest.split(split).shards[0])
    return np.frombuffer(data, dtype=np.dtype(manifest.stored[0].dtype).newbyteorder("<")).tolist()


def tokenizer_of(prepared: PreparedDataset) -> Tokenizer:
    reference = manifest_of(prepared).tokenizer
    assert reference is not None
    return load_tokenizer(prepared.objects[tokenizer_key(reference.sha256)])


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


class TestTokenizer:
    def test_it_learns_merges(self) -> None:
        assert TRAINED.vocab == 400
        assert len(TRAINED.encode(SAMPLE)) < len(SAMPLE.encode()) * 0.6

    def test_without_merges_a_token_is_a_byte(self) -> None:
        plain = train_tokenizer([SAMPLE], 256)
        assert plain.vocab == 256
        assert len(plain.encode("häß 🙂")) == len("häß 🙂".encode())

    @settings(max_examples=300, deadline=None)
    @given(st.text())
    def test_any_text_comes_back_exactly(self, text: str) -> None:
        ids = TRAINED.encode(text)
        assert TRAINED.decode(ids) == text
        assert max(ids, default=0) < TRAINED.vocab

    @pytest.mark.parametrize(
        "text", ["", " ", "  a", "a\r\n\tb", "\ufeffbom", "e\u0301 é", "<|endoftext|>", "\x00", "Ġ"]
    )
    def test_awkward_text_comes_back_exactly(self, text: str) -> None:
        assert TRAINED.decode(TRAINED.encode(text)) == text

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.integers(0, TRAINED.vocab - 1)))
    def test_streaming_equals_decoding_and_never_splits_a_character(self, ids: list[int]) -> None:
        stream = TRAINED.stream()
        pieces = [stream.push(token) for token in ids]
        pieces.append(stream.finish())
        assert "".join(pieces) == TRAINED.decode(ids)

    def test_a_byte_is_its_own_token(self) -> None:
        plain = byte_tokenizer()
        assert plain.vocab == 256
        assert plain.encode("abcd\0\n ÿ🙂") == list("abcd\0\n ÿ🙂".encode())
        assert plain.decode(range(256)) == bytes(range(256)).decode("utf-8", "replace")

    def test_a_character_of_four_tokens_comes_out_with_the_last(self) -> None:
        plain = train_tokenizer(["x"], 256)
        stream = plain.stream()
        assert [stream.push(token) for token in plain.encode("🙂!")] == ["", "", "", "🙂", "!"]
        assert stream.push(plain.encode("🙂")[0]) == ""
        assert stream.finish() == "\ufffd"
        assert stream.finish() == ""

    def test_a_token_outside_the_vocabulary_is_refused(self) -> None:
        with pytest.raises(InvalidData, match="token 400 "):
            TRAINED.decode([400])

    def test_saved_and_loaded_it_is_the_same(self) -> None:
        loaded = load_tokenizer(TRAINED.to_json())
        assert loaded.encode(SAMPLE) == TRAINED.encode(SAMPLE)
        assert loaded.vocab == TRAINED.vocab
        assert loaded.to_json() == TRAINED.to_json()

    def test_a_files_special_tokens_are_text_when_text_says_them(self) -> None:
        document = json.loads(TRAINED.to_json())
        special = {
            "id": 400, "content": "<|endoftext|>", "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": True,
        }  # fmt: skip
        document["added_tokens"] = [special]
        loaded = load_tokenizer(json.dumps(document).encode())
        assert loaded.vocab == 401
        ids = loaded.encode("a<|endoftext|>b")
        assert 400 not in ids
        assert ids == TRAINED.encode("a<|endoftext|>b")
        assert loaded.decode([400]) == "<|endoftext|>"

    def test_no_added_token_is_found_in_text(self) -> None:
        """Also one that its file does not call special, and that would swallow the spaces around it."""
        document = json.loads(TRAINED.to_json())
        document["added_tokens"] = [
            {"id": 400, "content": "<|Ġuser|>", "single_word": False, "lstrip": True, "rstrip": True,
             "normalized": False, "special": False}
        ]  # fmt: skip
        loaded = load_tokenizer(json.dumps(document).encode())
        text = "a  <|Ġuser|>  b"
        assert loaded.encode(text) == TRAINED.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
        assert loaded.decode([400]) == "<|Ġuser|>"
        # What is stored with the dataset is read again by whoever generates.
        assert load_tokenizer(loaded.to_json()).encode(text) == TRAINED.encode(text)

    @pytest.mark.parametrize(
        "data", [b"", b"{}", b"[]", b"\xff", b'{"decoder":{"type":"ByteLevel"},"normalizer":null}']
    )
    def test_other_bytes_are_no_tokenizer(self, data: bytes) -> None:
        with pytest.raises(InvalidData):
            load_tokenizer(data)

    def test_a_tokenizer_that_changes_text_is_refused(self) -> None:
        document = json.loads(TRAINED.to_json())
        with pytest.raises(InvalidData, match="byte-level"):
            load_tokenizer(json.dumps(document | {"normalizer": {"type": "Lowercase"}}).encode())
        with pytest.raises(InvalidData, match="byte-level"):
            load_tokenizer(json.dumps(document | {"decoder": None}).encode())


class TestText:
    def test_both_splits_together_are_the_text(self, tmp_path: Path) -> None:
        documents = [
            f"document {n} <|endoftext|>\r\n" + "".join(f"word{i * n % 97} " for i in range(900)) for n in range(6)
        ]
        for n, document in enumerate(documents):
            write(tmp_path / f"d/{n}.txt", document)
        prepared = prepare_text(tmp_path / "d", tokenizer="bpe:300", name="docs", split=0.3)
        manifest = manifest_of(prepared)
        joined = "\n".join(documents)
        assert manifest.text_sha256 == hashlib.sha256(joined.encode()).hexdigest()
        assert manifest.source_bytes == sum(len(d.encode()) for d in documents)
        assert manifest.name == "docs"
        assert manifest.tokenizer is not None
        assert manifest.tokenizer.kind == "bpe:300"
        assert manifest.tokenizer.vocab == 300
        assert prepared.id == hashlib.sha256(prepared.manifest).hexdigest()
        encoder = tokenizer_of(prepared)
        expected = [t for n, d in enumerate(documents) for t in encoder.encode(d + ("\n" if n < 5 else ""))]
        train, validation = tokens_of(prepared, "train"), tokens_of(prepared, "validation")
        assert sorted(train + validation) == sorted(expected)
        assert 0.1 < len(validation) / len(expected) < 0.5
        # Blocks keep the text's order, so the longest run of training tokens is found in the text.
        assert encoder.decode(train[:100]) in joined
        assert set(prepared.objects) == {shard_key(s) for s in manifest.shard_sizes()} | {
            tokenizer_key(manifest.tokenizer.sha256)
        }

    def test_equal_blocks_share_a_side(self) -> None:
        blocks = [np.full(text_module.BLOCK_TOKENS_MIN, number, dtype=np.uint32) for number in range(20)]
        train, validation = map(np.concatenate, text_module._divide(blocks * 3, 0.5))
        assert len(train) + len(validation) == 60 * text_module.BLOCK_TOKENS_MIN
        assert not set(train.tolist()) & set(validation.tolist())
        assert min(len(set(train.tolist())), len(set(validation.tolist()))) > 3

    def test_small_text_still_has_both_sides(self, tmp_path: Path) -> None:
        for seed in range(12):
            path = write(tmp_path / f"{seed}.txt", " ".join(str(seed * i) for i in range(400)))
            manifest = manifest_of(prepare_text(path, tokenizer="bpe:256", split=0.01, context=16))
            assert manifest.rows("validation", 16) >= 1
            assert manifest.rows("train", 16) > manifest.rows("validation", 16)

    def test_without_a_split_all_is_training(self, tmp_path: Path) -> None:
        prepared = prepare_text(write(tmp_path / "a.txt", SAMPLE), tokenizer="bpe:300", split=0.0)
        assert manifest_of(prepared).validation.count == 0
        assert tokenizer_of(prepared).decode(tokens_of(prepared, "train")) == SAMPLE

    def test_long_text_is_cut_into_pieces_and_shards(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(text_module, "PIECE_CHARACTERS", 100)
        monkeypatch.setattr(text_module, "SHARD_TOKENS", 256)
        monkeypatch.setattr(text_module, "TRAINING_BYTES", 1000)
        monkeypatch.setattr(text_module, "TRAINING_BYTES_PER_TOKEN", 1)
        prepared = prepare_text(write(tmp_path / "a.txt", SAMPLE), tokenizer="bpe:300", split=0.0)
        shards = manifest_of(prepared).train.shards[0]
        assert len(shards) > 3
        assert {s.count for s in shards[:-1]} == {256}
        assert tokenizer_of(prepared).decode(tokens_of(prepared, "train")) == SAMPLE

    def test_a_large_vocabulary_takes_four_bytes(self, tmp_path: Path) -> None:
        document = json.loads(train_tokenizer([SAMPLE], 300).to_json())
        document["model"]["vocab"]["Ġfar"] = 70_000
        path = write(tmp_path / "tokenizer.json", json.dumps(document))
        prepared = prepare_text(write(tmp_path / "a.txt", SAMPLE), tokenizer=str(path), split=0.0)
        manifest = manifest_of(prepared)
        assert manifest.tokenizer is not None
        assert (manifest.tokenizer.kind, manifest.tokenizer.vocab) == ("file", 70_001)
        assert manifest.stored[0].dtype == "uint32"
        assert tokenizer_of(prepared).decode(tokens_of(prepared, "train")) == SAMPLE

    def test_globs_folders_and_files_each_once(self, tmp_path: Path) -> None:
        write(tmp_path / "b.txt", "bb" * 100)
        write(tmp_path / "a.txt", "aa" * 100)
        write(tmp_path / "sub/c.txt", "cc" * 100)
        write(tmp_path / "sub/empty.txt", "")
        write(tmp_path / ".hidden/d.txt", b"\0")
        texts = {
            "glob": prepare_text(str(tmp_path / "*.txt"), tokenizer="bpe:256"),
            "all": prepare_text(tmp_path, tokenizer="bpe:256"),
            "twice": prepare_text([tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "a.txt"], tokenizer="bpe:256"),
        }
        hashes = {key: manifest_of(value).text_sha256 for key, value in texts.items()}
        two = "\n".join(["aa" * 100, "bb" * 100])
        assert hashes["glob"] == hashes["twice"] == hashlib.sha256(two.encode()).hexdigest()
        assert hashes["all"] == hashlib.sha256((two + "\n" + "cc" * 100).encode()).hexdigest()

    def test_the_same_text_is_the_same_dataset_in_every_process(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.txt", SAMPLE)
        script = (
            "import sys; from dcnr.adapters.text import *; print(prepare_text(sys.argv[1], tokenizer='bpe:400').id)"
        )
        ids = {
            subprocess.run(
                [sys.executable, "-c", script, str(path)],
                env=os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for seed, threads in (("1", "1"), ("2", "2"))
        }
        assert len(ids) == 1
        assert ids == {prepare_text(path, tokenizer="bpe:400").id + "\n"}


DIRTY = {
    "line separator": "a\u2028b",
    "paragraph separator": "a\u2029b",
    "next line": "a\u0085b",
    "form feed": "a\fb\v",
    "line ends": "a\r\nb\rc\n\rd\n",
    "byte order mark": "\ufeffa\ufeffb",
    "zero": "a\0b\0\0",
    "chinese": "深度学习，机器。\u3000学",
    "emoji": "👩‍👩‍👧‍👦 🇩🇪 👍🏽",
    "combining": "e\u0301 é \u0915\u094d\u0937 \u202e\u200b",
    "special": "<|endoftext|><s></s>[INST]<|im_start|>",
    "replacement": "\ufffd",
    "spaces": "  \t\t   a \u00a0  ",
}


@pytest.mark.parametrize("kind", ["bpe:400", "bytes"])
class TestDirtyText:
    def test_it_comes_back_exactly_from_files(self, tmp_path: Path, kind: str) -> None:
        whole = "|".join(DIRTY.values()) * 10
        prepared = prepare_text(write(tmp_path / "a.txt", whole), tokenizer=kind, split=0.0)
        assert tokenizer_of(prepared).decode(tokens_of(prepared, "train")) == whole
        assert manifest_of(prepared).text_sha256 == hashlib.sha256(whole.encode()).hexdigest()

    @pytest.mark.parametrize("name", DIRTY)
    def test_each_alone(self, tmp_path: Path, kind: str, name: str) -> None:
        text = f"one {DIRTY[name]}|{DIRTY[name]} two"
        prepared = prepare_text(write(tmp_path / "a.txt", text), tokenizer=kind, split=0.0)
        assert tokenizer_of(prepared).decode(tokens_of(prepared, "train")) == text

    # 7 s and 4 s on two cores; a merge that walked the line whole would take hours.
    @pytest.mark.timeout(100)
    def test_a_line_of_20_mb_without_spaces(self, tmp_path: Path, kind: str) -> None:
        line = np.random.default_rng(0).integers(ord("a"), ord("z") + 1, 20_000_000, dtype=np.uint8).tobytes().decode()
        prepared = prepare_text(write(tmp_path / "a.txt", line), tokenizer=kind, split=0.0)
        assert tokenizer_of(prepared).decode(tokens_of(prepared, "train")) == line


class TestTokenizerFiles:
    def file(self, path: Path, **changed: object) -> str:
        document = json.loads(TRAINED.to_json()) | changed
        return str(write(path / "tokenizer.json", json.dumps(document)))

    def test_a_special_token_in_data_is_text(self, tmp_path: Path) -> None:
        special = {"id": 400, "content": "<|endoftext|>", "single_word": False, "lstrip": True, "rstrip": True,
                   "normalized": False, "special": True}  # fmt: skip
        text = "one  <|endoftext|>  two<|endoftext|>"
        given_file = self.file(tmp_path, added_tokens=[special])
        prepared = prepare_text(write(tmp_path / "a.txt", text), tokenizer=given_file, split=0.0)
        tokens = tokens_of(prepared, "train")
        assert 400 not in tokens
        assert tokenizer_of(prepared).decode(tokens) == text
        assert tokenizer_of(prepared).vocab == 401

    @pytest.mark.parametrize(
        ("pre_tokenizer", "said"),
        [
            ({"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
             "found ' def f():', expected 'def f():'"),
            ({"type": "Sequence", "pretokenizers": [
                {"type": "WhitespaceSplit"},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]},
             "found 'f():', expected ' f():'"),
        ],
    )  # fmt: skip
    def test_one_that_changes_text_is_found_out(self, tmp_path: Path, pre_tokenizer: object, said: str) -> None:
        given_file = self.file(tmp_path, pre_tokenizer=pre_tokenizer)
        with pytest.raises(InvalidData) as caught:
            prepare_text(write(tmp_path / "a.txt", "def f():"), tokenizer=given_file, split=0.0)
        assert f"tokenizer {given_file}: does not give text back exactly: {said}" in str(caught.value)


class TestInvalidText:
    def test_it_is_replaced_and_counted_by_option(self, tmp_path: Path) -> None:
        # Two bad sequences and a U+FFFD that was there; a truncated character counts once.
        path = write(tmp_path / "a.txt", b"good \xff bad \xef\xbf\xbd \xe6\x97 end")
        prepared = prepare_text(path, tokenizer="bytes", split=0.0, invalid_utf8="replace")
        assert manifest_of(prepared).replaced == 2
        assert tokenizer_of(prepared).decode(tokens_of(prepared, "train")) == "good \ufffd bad \ufffd \ufffd end"

    def test_clean_text_is_the_same_dataset_either_way(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.txt", SAMPLE)
        both = [prepare_text(path, tokenizer="bytes", invalid_utf8=invalid) for invalid in ("refuse", "replace")]
        assert both[0].id == both[1].id
        assert b"replaced" not in both[0].manifest

    def test_there_is_no_third_way(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="found 'ignore', expected refuse or replace"):
            prepare_text(write(tmp_path / "a.txt", SAMPLE), invalid_utf8="ignore")


class TestBadInput:
    def test_a_file_named_in_another_encoding_has_a_name_to_show(self, tmp_path: Path) -> None:
        path = tmp_path / os.fsdecode(b"caf\xe9.txt")
        assert manifest_of(prepare_text(write(path, SAMPLE), tokenizer="bytes")).name == "caf\ufffd"

    def test_the_home_of_nobody_holds_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(UnknownName, match=r"~nosuchuser/x\.txt: no such file"):
            prepare_text("~nosuchuser/x.txt", tokenizer="bytes")
        with pytest.raises(UsageError, match=r"tokenizer ~nosuchuser/t\.json: neither"):
            prepare_text(write(tmp_path / "a.txt", SAMPLE), tokenizer="~nosuchuser/t.json")

    def test_binary_is_not_text(self, tmp_path: Path) -> None:
        path = write(tmp_path / "image.png", b"\x89PNG\r\n" * 10)
        with pytest.raises(
            InvalidData, match=r"image\.png: not text: 10 sequences of bytes are no UTF-8, the first at byte 0"
        ):
            prepare_text(path)
        with pytest.raises(InvalidData, match=r"image\.png"):
            prepare_text([write(tmp_path / "a.txt", SAMPLE), path])
        with pytest.raises(InvalidData, match=r"2 sequences .* first at byte 5 .* --invalid-utf8 replace"):
            prepare_text(write(tmp_path / "b.txt", b"\xef\xbf\xbdab\xff..\xc3."))

    def test_empty_files(self, tmp_path: Path) -> None:
        path = write(tmp_path / "sub" / "none.txt", "")
        for given_path in (path, tmp_path, str(tmp_path / "**" / "*.txt")):
            with pytest.raises(InvalidData, match=r"empty"):
                prepare_text(given_path)

    def test_shorter_than_a_row(self, tmp_path: Path) -> None:
        path = write(tmp_path / "short.txt", "abc" * 10)
        with pytest.raises(InvalidData, match=r"short\.txt: too short"):
            prepare_text(path, tokenizer="bpe:256", context=128)
        assert manifest_of(prepare_text(path, tokenizer="bpe:256", context=29)).rows("train", 29) == 1
        with pytest.raises(InvalidData, match=r"short\.txt: too short"):
            prepare_text(path, tokenizer="bpe:256", context=30)

    def test_a_missing_path_is_named(self, tmp_path: Path) -> None:
        for missing in (tmp_path / "nothing.txt", tmp_path / "*.rst"):
            with pytest.raises(UnknownName, match="no such file") as caught:
                prepare_text(missing)
            assert str(missing) in str(caught.value)
        with pytest.raises(InvalidData, match="no data files"):
            prepare_text([])

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
    def test_a_file_without_permission_is_named(self, tmp_path: Path) -> None:
        path = write(tmp_path / "secret.txt", SAMPLE)
        path.chmod(0)
        with pytest.raises(InvalidData, match=r"secret\.txt: cannot be read"):
            prepare_text(path)

    def test_other_sources_and_tokenizers(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.txt", SAMPLE)
        with pytest.raises(NotInThisVersion, match="s3://"):
            prepare_text("s3://bucket/a.txt")
        for kind in ("bpe:", "bpe:12", "bpe:x", "bpe:-5", "bpe:99999999"):
            with pytest.raises(UsageError, match=kind):
                prepare_text(path, tokenizer=kind)
        with pytest.raises(UsageError, match="neither bpe:N nor bytes nor"):
            prepare_text(path, tokenizer=str(tmp_path / "none.json"))
        with pytest.raises(InvalidData, match=r"a\.txt: not a tokenizer\.json"):
            prepare_text(path, tokenizer=str(path))
        for split in (-0.1, 1.0, float("nan")):
            with pytest.raises(UsageError, match="split"):
                prepare_text(path, split=split)


class TestPythonCorpus:
    def test_it_is_source_without_tests_in_a_fixed_order(self) -> None:
        files = python_corpus()
        root = Path(sysconfig.get_path("stdlib"))
        names = [path.relative_to(root).as_posix() for path in files]
        assert names == sorted(names)
        assert "argparse.py" in names
        assert "json/decoder.py" in names
        for name in names:
            assert not {"test", "tests", "idle_test", "encodings", "site-packages"} & set(name.split("/")[:-1])
        assert sum(path.stat().st_size for path in files) > 5_000_000

    def test_a_small_library_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(tmp_path / "argparse.py", "x = 1\n")
        write(tmp_path / "test/large.py", "#" * 6_000_000)
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
        with pytest.raises(InvalidData, match="has 6 bytes of source"):
            python_corpus()


class TestColumns:
    def test_equal_rows_share_a_side(self) -> None:
        x = np.arange(200) % 50
        prepared = prepare_columns({"x": x, "y": 2 * x}, name="split", split=0.3)
        manifest = manifest_of(prepared)
        sides = [
            np.frombuffer(b"".join(prepared.objects[shard_key(s.sha256)] for s in split.shards[n]), dtype="<i8")
            for split in (manifest.train, manifest.validation)
            for n in (0, 1)
        ]
        assert [len(side) for side in sides] == [len(sides[0])] * 2 + [200 - len(sides[0])] * 2
        assert 4 < len(set(sides[2])) < 30
        assert not set(sides[0]) & set(sides[2])
        assert (sides[1] == 2 * sides[0]).all()
        assert (sides[3] == 2 * sides[2]).all()
        with pytest.raises(UsageError, match="split"):
            prepare_columns({"x": x}, name="split", split=1.0)

    def test_ignored_positions_are_counted(self) -> None:
        y = np.array([[1, -100], [-100, -100], [5, 6], [7, -100]] * 25)
        x = np.arange(100)
        prepared = prepare_columns({"x": x, "y": y, "z": y + 200}, name="padded", split=0.3)
        manifest = manifest_of(prepared)
        (counts,) = manifest.ignored
        assert counts.column == "y"
        for split, shards in (("train", counts.train), ("validation", counts.validation)):
            (rows,) = (prepared.objects[shard_key(s.sha256)] for s in manifest.split(split).shards[0])
            (found,) = (prepared.objects[shard_key(s.sha256)] for s in shards)
            chosen = np.frombuffer(rows, dtype="<i8")
            assert np.frombuffer(found, dtype="<u4").tolist() == (y == -100).sum(axis=1)[chosen].tolist()
        assert manifest_of(prepare_columns({"y": y[2::4], "f": np.full(25, -100.0)}, name="n")).ignored == ()

    def test_types_are_kept_or_widened(self) -> None:
        given_types = [np.int8, np.uint16, np.int64, np.bool_, np.float16, np.float32, np.float64, ">f4"]
        prepared = prepare_columns(
            {str(n): np.ones((3, 2), dtype=dtype) for n, dtype in enumerate(given_types)}, name="types"
        )
        manifest = manifest_of(prepared)
        assert [c.dtype for c in manifest.stored] == ["int64"] * 4 + ["float32", "float32", "float64", "float32"]
        assert manifest.rows("train", 0) == 3
        assert manifest.rows("validation", 0) == 0
        assert manifest.columns_for(0) == manifest.stored
        shard = manifest.train.shards[7][0]
        assert prepared.objects[shard_key(shard.sha256)] == np.ones((3, 2), dtype="<f4").tobytes()

    def test_what_does_not_fit_is_refused(self) -> None:
        x = np.zeros((3, 2))
        cases: dict[str, tuple[dict[str, object], dict[str, object] | None]] = {
            "no columns": ({}, None),
            "different numbers of rows": ({"x": x, "y": np.zeros(4)}, None),
            "no rows": ({"x": np.zeros((0, 2))}, None),
            "single number": ({"x": np.float32(1)}, None),
            "found dtype complex128, expected integers": ({"x": np.zeros(3, dtype=complex)}, None),
            "found dtype <U1": ({"x": np.array(["a"])}, None),
            "beyond int64": ({"x": np.array([2**63], dtype=np.uint64)}, None),
            "other columns than train": ({"x": x}, {"y": x}),
            "sizes are at least 1": ({"x": np.zeros((3, 0))}, None),
        }
        for reason, (train, validation) in cases.items():
            with pytest.raises(InvalidData, match=reason):
                prepare_columns(train, name="bad", validation=validation)  # type: ignore[arg-type]


MEASURE = """
import resource, sys
from dcnr.wiring import TOOLKIT
from dcnr.adapters import columns, text

def peak() -> int:
    # macOS counts bytes, Linux KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

before = peak()
TOOLKIT.prepare(sys.argv[1], sys.argv[2], "", None, "refuse")
print(peak() - before)
"""


class TestMemory:
    def peak_bytes(self, path: Path, tokenizer: str = "") -> int:
        """Of preparing ``path``, beyond what the program takes anyway."""
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(path), tokenizer], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    # 125 MB and 133 MB for 20 MB; trained on as one string, the same text took 890 MB.
    @pytest.mark.parametrize("tokenizer", ["bpe:1024", "bytes"])
    def test_text_takes_a_few_times_its_size(self, tmp_path: Path, tokenizer: str) -> None:
        text = b"".join(path.read_bytes() for path in python_corpus())[:10_000_000]
        assert self.peak_bytes(write(tmp_path / "a.txt", text), tokenizer) < 15 * len(text)

    def test_columns_take_a_few_times_their_size(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        np.savez(tmp_path / "a.npz", x=rng.normal(size=(40_000, 64)).astype(np.float32))
        lines = "\n".join(",".join(f"{n:.6f}" for n in row) for row in rng.normal(size=(40_000, 25)))
        write(tmp_path / "a.csv", ",".join(f"x.{n}" for n in range(25)) + "\n" + lines)
        for name in ("a.npz", "a.csv"):
            size = (tmp_path / name).stat().st_size
            assert 8_000_000 < size < 12_000_000
            assert self.peak_bytes(tmp_path / name) < 6 * size


def test_a_token_that_stands_for_nothing_becomes_a_replacement() -> None:
    """A network may have a larger vocabulary than its tokenizer, and draw from all of it."""
    stream = TRAINED.stream()
    first = TRAINED.encode("a")[0]
    assert "".join([stream.push(first), stream.push(TRAINED.vocab + 7), stream.push(first)]) == "a\ufffda"
