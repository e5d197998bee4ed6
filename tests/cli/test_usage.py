"""Help, exit codes and messages, without a network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dcnr.cli.main import app


def dcnr(*arguments: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), env=env)


@pytest.fixture(autouse=True)
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this machine's own state reaches a test."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("DCNR_NETWORK", raising=False)


def test_help_loads_neither_grpc_nor_torch() -> None:
    script = (
        "import sys; from dcnr.cli.main import app; app(['--help'], standalone_mode=False); "
        "sys.exit(', '.join({'grpc', 'torch', 'numpy', 'asyncio', 'tokenizers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for word in ("demo", "up", "orchestrator", "pnode", "network", "data", "train", "session", "generate", "doctor"):
        assert word in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["nodes"],
        ["status"],
        ["events"],
        ["network", "list"],
        ["network", "show", "x"],
        ["data", "list"],
        ["data", "show", "x"],
        ["session", "list"],
        ["session", "show", "x"],
        ["session", "follow", "x"],
        ["session", "stop", "x"],
        ["session", "resume", "x"],
        ["session", "verify", "x"],
        ["generate", "x", "y"],
        ["train", "x", "--data", "y", "--steps", "1"],
    ],
    ids=" ".join,
)
def test_without_a_network_every_command_says_how_to_start_one(arguments: list[str]) -> None:
    result = dcnr(*arguments)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "dcnr up" in result.stderr
    assert "--network" in result.stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--mode", "eventual"),
        ("--exact", "strict"),
        ("--delay", "1"),
        ("--replicas", "2"),
    ],
)
def test_what_is_not_built_yet_says_so(option: str, value: str) -> None:
    result = dcnr("train", "net", "--data", "d", "--steps", "1", option, value)
    assert result.exit_code == 2
    assert result.stderr == f"error: {option} {value} is not in this version\n"


@pytest.mark.parametrize(
    "options",
    [
        ["--mode", "exact"],
        ["--exact", "best"],
        ["--delay", "0"],
        ["--replicas", "1"],
        ["--clip-scope", "network"],
        ["--clip-scope", "vnode"],
        ["--schedule", "linear"],
        ["--schedule", "wsd", "--min-lr", "1e-5"],
        ["--schedule", "constant"],
        ["--init-from", "abc@3"],
        ["--precision", "float32"],
        ["--precision", "bf16"],
        ["--clip-norm", "1.0"],
        ["--steps", "3", "--schedule", "cosine", "--warmup", "3", "--min-lr", "1e-5"],
        ["--optimizer", "sgd", "--momentum", "0.9", "--weight-decay", "0.1"],
        ["--eval-every", "5", "--eval-batches", "2"],
        ["--optimizer", "muon", "--lr", "1e-2", "--momentum", "0.9", "--betas", "0.8,0.9", "--eps", "1e-6"],
    ],
    ids=" ".join,
)
def test_contract_defaults_and_built_values_pass(options: list[str]) -> None:
    """They get as far as looking for a network."""
    result = dcnr("train", "net", "--data", "d", "--steps", "1", *options)
    assert result.exit_code == 1
    assert "dcnr up" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["train", "net", "--data", "d", "--steps", "1", "--mode", "magic"], "--mode magic: this version has exact"),
        (
            ["train", "net", "--data", "d", "--steps", "1", "--precision", "half"],
            "--precision half: one of float32, float64, bf16",
        ),
        (["train", "net", "--data", "d", "--steps", "1", "--optimizer", "lion"], "unknown optimizer 'lion'"),
        (["train", "net", "--data", "d", "--steps", "1", "--betas", "0.9"], "--betas takes two numbers"),
        *(
            (["train", "net", "--data", "d", "--steps", "1", *options.split()], complaint)
            for options, complaint in (
                (
                    "--optimizer sgd --betas 0.9,0.999",
                    "--betas 0.9,0.999: --optimizer sgd has none, it belongs to adamw, adam, muon",
                ),
                ("--optimizer sgd --eps 1e-8", "--eps 1e-08: --optimizer sgd has none"),
                ("--momentum 0.9", "--momentum 0.9: --optimizer adamw has none, it belongs to sgd, muon"),
                ("--optimizer adam --momentum 0.0", "--momentum 0.0: --optimizer adam has none"),
                ("--warmup 2", "--warmup 2: --steps 1 end before --lr is reached"),
                ("--schedule constant --min-lr 1e-5", "--min-lr 1e-05: --schedule constant stays at --lr"),
                ("--clip-scope vnode --clip-norm 0", "--clip-scope vnode: --clip-norm 0 clips nothing"),
                ("--eval-batches 4", "--eval-batches 4: nothing is evaluated without --eval-every"),
            )
        ),
        (["network", "analyze", "x.yaml", "--momentum", "0.9"], "--momentum 0.9: --optimizer adamw has none"),
        (["pnode", "--memory", "lots"], "a size is a number"),
        (["pnode", "--memory", "0"], "a PNode that offers no memory hosts nothing"),
        (["pnode", "--upload-limit", "0"], "a PNode has to send the states that it computes"),
        (["pnode", "--bootstrap", "127.0.0.1:50050,garbage"], "--bootstrap takes HOST:PORT"),
        (["pnode", "--device", "toaster"], "auto, cpu, cuda:N or mps"),
        (["pnode", "--device", "cuda:0"], "not in this version"),
        (["pnode", "--listen", "127.0.0.1:99999"], "port up to 65535"),
        (["pnode", "--http-proxy", "127.0.0.1:3128"], "--http-proxy takes http://HOST:PORT, found '127.0.0.1:3128'"),
        (["orchestrator", "--listen", "nonsense"], "port up to 65535"),
        (["orchestrator", "--bootstrap", "a:1"], "not in this version"),
        (["network", "create", "missing.yaml"], "no network file missing.yaml"),
        (["network", "template", "llama", "--preset", "demo"], "unknown preset 'demo' of 'llama': expected none"),
        (["network", "template", "gpt", "--preset", "huge"], "unknown preset"),
        (["network", "template", "cnn"], "unknown template"),
        (["data", "add", "missing.txt"], "no file or folder missing.txt"),
        (
            ["data", "add", "README.md", "--dtype", "float32"],
            "--dtype float32: found 'float32', expected COLUMN=DTYPE, as in x=float32",
        ),
        (["data", "add", "~nosuchuser/x.txt"], "no file or folder ~nosuchuser/x.txt"),
        (["simulate", "--seeds", "3..1"], "holds no seed"),
        (["simulate", "--seeds", "many"], "A..B"),
        (["simulate", "--only", "pnodes=two"], "found 'pnodes=two'; expected NAME=NUMBER"),
        (["bench", "juggling"], "unknown benchmark 'juggling'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_exits_with_2_and_one_line(arguments: list[str], complaint: str) -> None:
    result = dcnr(*arguments)
    assert result.exit_code == 2, result.output
    assert complaint in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["train"], ["nodes", "--colour"], ["fly"], ["train", "x", "--data", "y", "--steps", "0"]]
)
def test_what_the_parser_refuses_exits_with_2(arguments: list[str]) -> None:
    assert dcnr(*arguments).exit_code == 2


def test_an_option_comes_from_its_variable_and_a_flag_beats_it() -> None:
    assert (
        "eventual is not in this version"
        in dcnr("train", "n", "--data", "d", "--steps", "1", env={"DCNR_TRAIN_MODE": "eventual"}).stderr
    )
    flag = dcnr("train", "n", "--data", "d", "--steps", "1", "--mode", "exact", env={"DCNR_TRAIN_MODE": "eventual"})
    assert "dcnr up" in flag.stderr


def test_nobody_at_the_address_is_a_failure_with_the_address() -> None:
    # Port 1 of loopback: nothing listens there.
    result = dcnr("nodes", "--network", "127.0.0.1:1")
    assert result.exit_code == 1
    assert "127.0.0.1:1" in result.stderr
    assert result.stderr.count("\n") == 1


def test_debug_gives_the_traceback() -> None:
    result = dcnr("--debug", "nodes")
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "Unreachable"
    assert dcnr("nodes").exception.__class__ is SystemExit


def test_templates_are_network_files() -> None:
    from dcnr.adapters.yaml_network import load_network

    gpt = dcnr("network", "template", "gpt", "--preset", "demo", "--layers", "2")
    assert gpt.exit_code == 0
    definition = load_network(gpt.stdout)
    assert sum(node.type == "attention" for node in definition.nodes) == 2
    mlp = load_network(
        dcnr("network", "template", "mlp", "--inputs", "3", "--dim", "5", "--layers", "2", "--outputs", "4").stdout
    )
    assert [n.config["out_dim"] for n in mlp.nodes if n.type == "linear"] == [5, 5, 4]


def test_a_network_file_that_is_refused_says_where(tmp_path: Path) -> None:
    """The file is read before anybody is asked, and every problem is reported."""
    bad = tmp_path / "bad.yaml"
    bad.write_text(
        "name: bad\nnodes:\n- {id: a, type: linear, config: {in_dim: 2, out_dim: x}}\n- {id: b, type: dance}\n"
    )
    result = dcnr("network", "create", str(bad), "--network", "127.0.0.1:1")
    assert result.exit_code == 1
    assert "line 3" in result.stderr
    assert "line 4" in result.stderr
    assert "'b'" in result.stderr


def test_doctor_prints_a_json_line_per_check() -> None:
    result = dcnr("doctor", "--json")
    checks = [json.loads(line) for line in result.stdout.splitlines()]
    assert {"python", "torch", "proxy", "disk", "machine"} <= {check["check"] for check in checks}
    assert result.exit_code == 0


def test_the_catalogue_is_shown() -> None:
    overview = dcnr("network", "types")
    assert overview.exit_code == 0
    assert "tied_lm_head_ce" in overview.stdout
    one = dcnr("network", "types", "dense")
    assert one.exit_code == 0
    for part in ("linear", "weight [5, 4]", "in_dim", "required", "config: {in_dim: 4, out_dim: 5}"):
        assert part in one.stdout
    assert "tie_weight_alias" in dcnr("network", "types", "common").stdout
    found = json.loads(dcnr("network", "types", "dropout", "--json").stdout)
    assert found["keys"][0]["key"] == "rate"
    assert (found["keys"][0]["at_least"], found["keys"][0]["less_than"]) == (0.0, 1.0)
    lines = [json.loads(line) for line in dcnr("network", "types", "--json").stdout.splitlines()]
    assert [line.get("type") for line in lines[:2]] == [None, "linear"]
    assert dcnr("network", "types", "--markdown").stdout.startswith("# Node types")


def test_an_unknown_type_is_answered_with_the_nearest() -> None:
    result = dcnr("network", "types", "liner")
    assert result.exit_code == 2
    assert "unknown type: found 'liner', expected 'linear'" in result.stderr
    assert dcnr("network", "types", "linear", "--markdown").exit_code == 2
