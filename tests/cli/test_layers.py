"""Where options come from: a flag beats a variable, a variable the file, the file the default."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dcnr.cli.main import app

FILE = """\
network = "127.0.0.1:9"

[train]
lr = 0.01
batch-size = 16
betas = [0.8, 0.9]
mode = "eventual"

[up]
pnodes = 5

[session.verify]
from = 3
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = tmp_path / "dcnr.toml"
    path.write_text(FILE)
    return path


def dcnr(*arguments: object, **variables: str) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env=dict(variables))


def shown(*arguments: object, **variables: str) -> dict[str, tuple[Any, str]]:
    """``config show --json``: option to value and source."""
    result = dcnr("config", "show", *arguments, "--json", **variables)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    return {f"{row['command']} {row['option']}": (row["value"], row["from"]) for row in rows}


def test_each_layer_beats_the_one_below(file: Path) -> None:
    lr = "dcnr train --lr"
    assert shown("train")[lr] == (3e-4, "default")
    assert shown("train", "--config", file)[lr] == (0.01, f"file {file}:4")
    assert shown("train", "--config", file, DCNR_TRAIN_LR="0.5")[lr] == (0.5, "variable DCNR_TRAIN_LR")
    both = shown("train", "--lr", "0.7", "--config", file, DCNR_TRAIN_LR="0.5")
    assert both[lr] == (0.7, "flag")
    assert both["dcnr train --batch-size"] == (16, f"file {file}:5")
    assert both["dcnr train --betas"] == ("0.8,0.9", f"file {file}:6")


def test_the_commands_themselves_see_the_layers(file: Path) -> None:
    train = ["train", "n", "--data", "d", "--steps", "1"]
    assert "--mode eventual is not in this version" in dcnr(*train, "--config", file).stderr
    assert "--mode eventual is not in this version" in dcnr("--config", file, *train).stderr
    assert "--mode eventual is not in this version" in dcnr(*train, DCNR_CONFIG=str(file)).stderr
    assert "127.0.0.1:9" in dcnr(*train, "--config", file, DCNR_TRAIN_MODE="exact").stderr
    assert "127.0.0.1:1" in dcnr(*train, "--config", file, "--mode", "exact", "--network", "127.0.0.1:1").stderr


def test_a_key_above_all_tables_is_for_every_command_that_has_the_option(file: Path) -> None:
    everything = shown("--config", file)
    for command in ("nodes", "train", "network create", "session verify"):
        assert everything[f"dcnr {command} --network"] == ("127.0.0.1:9", f"file {file}:1")
    assert everything["dcnr session verify --from"] == (3, f"file {file}:13")
    assert everything["dcnr --config"] == (str(file), "flag")
    file.write_text("json = true\n[nodes]\njson = false\n")
    everything = shown("--config", file)
    assert everything["dcnr nodes --json"] == (False, f"file {file}:3")
    assert everything["dcnr status --json"] == (True, f"file {file}:1")


def test_the_commands_own_variable_beats_the_one_of_all_commands(file: Path) -> None:
    network = "dcnr train --network"
    both = {"DCNR_NETWORK": "127.0.0.1:2", "DCNR_TRAIN_NETWORK": "127.0.0.1:3"}
    assert shown("train", **both)[network] == ("127.0.0.1:3", "variable DCNR_TRAIN_NETWORK")
    assert shown("nodes", **both)["dcnr nodes --network"] == ("127.0.0.1:2", "variable DCNR_NETWORK")
    assert shown("nodes", "--config", file, DCNR_NETWORK="x")["dcnr nodes --network"] == ("x", "variable DCNR_NETWORK")
    assert "127.0.0.1:3" in dcnr("train", "n", "--data", "d", "--steps", "1", **both).stderr


def test_debug_in_the_file_is_in_effect(file: Path) -> None:
    file.write_text("debug = true\n")
    assert shown("--config", file)["dcnr --debug"] == (True, f"file {file}:1")
    assert type(dcnr("nodes", "--config", file).exception).__name__ == "Unreachable"
    assert type(dcnr("nodes", "--config", file, DCNR_DEBUG="0").exception) is SystemExit
    file.write_text("debug = false\n")
    assert type(dcnr("nodes", "--config", file).exception) is SystemExit
    assert type(dcnr("nodes", "--config", file, "--debug").exception).__name__ == "Unreachable"


def test_every_option_of_every_command_is_shown() -> None:
    everything = shown()
    assert len(everything) > 80
    assert {"dcnr --debug", "dcnr pnode --memory", "dcnr network template --preset"} <= set(everything)
    assert {source for _, source in everything.values()} == {"default"}
    assert re.search(r"^dcnr train +--lr +0.0003 +default *$", dcnr("config", "show").stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[trian]\nlr = 3", "line 1: unknown key: found 'trian', expected 'train'"),
        ("[train]\n\nlrr = 3", "line 3: unknown key: found 'train.lrr', expected 'lr'"),
        ("netwrk = 'a'", "line 1: unknown key: found 'netwrk', expected 'network'"),
        ("[session.verfy]\nto = 3", "unknown key: found 'session.verfy', expected 'verify'"),
        ("[up]\npnodes = 0", "line 2: up.pnodes: found 0: "),
        ("[up]\npnodes = 1.5", "line 2: up.pnodes: found 1.5: "),
        ("[up]\npnodes = true", "line 2: up.pnodes: found True: "),
        ("[train]\nlr = 'fast'", "line 2: train.lr: found 'fast': "),
        ("[up.home]\na = 1", "found a table, expected a value"),
        ("\nconfig = 'b.toml'", "line 2: config: found 'b.toml', expected a table, [config]"),
        ("[[train]]\nlr = 3", "line 1: train: found [{'lr': 3}], expected a table, [train]"),
        ("[up\n", "cannot be read: Expected ']'"),
    ],
)
def test_a_wrong_file_is_wrong_usage_and_names_file_and_key(file: Path, text: str, said: str) -> None:
    file.write_text(text)
    result = dcnr("nodes", "--config", file)
    assert result.exit_code == 2
    assert str(file) in result.stderr
    assert said in result.stderr


def test_all_wrong_keys_are_named(file: Path) -> None:
    file.write_text("[train]\na = 1\nbb = 2\nlr = 'x'\n")
    assert dcnr("nodes", "--config", file).stderr.count(str(file)) == 3


def test_no_file_is_wrong_usage(tmp_path: Path) -> None:
    result = dcnr("nodes", "--config", tmp_path / "absent.toml")
    assert result.exit_code == 2
    assert result.stderr == f"error: config file {tmp_path / 'absent.toml'} cannot be read: No such file or directory\n"


def test_an_unknown_variable_is_a_warning_with_the_nearest_name(file: Path) -> None:
    result = dcnr("config", "show", "up", DCNR_TRIAN_LR="1", DCNR_ZZZZ="1", DCNR_TORCH="default", DCNR_NETWORK="x")
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        "warning: unknown variable: found DCNR_TRIAN_LR, expected DCNR_TRAIN_LR",
        "warning: unknown variable: found DCNR_ZZZZ, expected none",
    ]


def test_a_variable_named_like_the_version_is_no_option() -> None:
    result = dcnr("config", "show", "up", DCNR_VERSION="1.2.3")
    assert result.exit_code == 0
    assert "found DCNR_VERSION, expected" in result.stderr


def test_every_variable_that_is_known_is_read() -> None:
    """No name is promised that the parser ignores."""
    from typer.main import get_command

    from dcnr.cli.layers import options

    for option in options(get_command(app)):
        if option.key == "config" or option.path == ("config", "show"):
            continue
        default = option.parameter.default
        for variable in option.variables:
            row = shown(*option.path, **{variable: str(2 if default in (None, "") else default)})[
                f"{' '.join(('dcnr', *option.path))} {option.parameter.opts[0]}"
            ]
            assert row[1] == f"variable {variable}"


def test_a_file_named_in_another_encoding_is_shown_escaped(tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"caf\xe9.toml")
    file.write_text("[nodes]\nnetwork = 'x'\n")
    words = ["config", "show", "nodes", "--json", "--config", str(file)]
    run = subprocess.run(
        [sys.executable, "-m", "dcnr.cli.main", *words],
        capture_output=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
    )
    assert run.returncode == 0, run.stderr
    assert rb"caf\udce9.toml:2" in run.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "unknown command 'trian': expected 'train'"),
        (["session", "verfy"], "unknown command 'session verfy': expected 'verify'"),
        (["session", "--lr", "3"], "options belong to one command"),
        (["--lr", "3"], "options belong to one command"),
        (["train", "model.yaml"], "only the options of `dcnr train` belong here: leave 'model.yaml' out"),
    ],
)
def test_what_cannot_be_shown(words: list[str], said: str) -> None:
    result = dcnr("config", "show", *words)
    assert result.exit_code == 2
    assert said in result.stderr


def test_words_after_two_dashes_are_left_alone() -> None:
    result = dcnr("generate", "--network", "127.0.0.1:1", "--", "net", "--config")
    assert result.exit_code == 1
    assert "127.0.0.1:1" in result.stderr
