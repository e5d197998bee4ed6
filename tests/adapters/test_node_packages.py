"""Node types that come from an installed package, in processes that have it and in one that has not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from dcnr.adapters.node_packages import GROUP, register_from
from dcnr.errors import UsageError

PACKAGE = """
from dcnr.network.node_type import Example, NodeType, per_element, same_shape

def _cube(lib, inputs, weights, call):
    return (lib.torch.pow(inputs[0], 3),)

CUBE = NodeType(name="cube", shape=same_shape, kernel=_cube, examples=(Example(),), flops=per_element(2))
"""

USE = """
import numpy as np
import dcnr
from dcnr.network.types import CATALOGUE, catalogue_digest
from dcnr.session.recipe import Recipe

g = dcnr.Graph("cubes")
h = g.linear(g.cube(g.input("x", [4], "float32")), out_dim=2)
g.cost("mse", h, target="y")
random = np.random.default_rng(0)
x = random.normal(size=(8, 4)).astype("float32")
rows = {"x": x, "y": (x**3)[:, :2].copy()}
trainer = dcnr.oracle.Trainer(g, Recipe(steps=40, batch_size=8, microbatches=2, optimizer=dcnr.AdamW(lr=0.05)), rows)
losses = [result.loss for result in trainer.run(40)]
assert losses[-1] < losses[0] / 4, losses
print(CATALOGUE["cube"].package, catalogue_digest())
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder as ``pip install`` leaves it."""
    (tmp_path / "cubes.py").write_text(PACKAGE)
    facts = tmp_path / "cubes-1.2.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: cubes\nVersion: 1.2\n")
    (facts / "entry_points.txt").write_text(f"[{GROUP}]\ncubes = cubes:CUBE\n")
    return tmp_path


def run(script: str, path: Path | None) -> subprocess.CompletedProcess[str]:
    paths = [str(path)] if path else []
    if "PYTHONPATH" in os.environ:
        paths.append(os.environ["PYTHONPATH"])
    return subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_a_type_of_an_installed_package_trains(installed: Path) -> None:
    found = run(USE, installed)
    assert found.returncode == 0, found.stderr
    package, version, digest = found.stdout.split()
    assert (package, version) == ("cubes", "1.2")
    plain = run("from dcnr.network.types import catalogue_digest; print(catalogue_digest())", None)
    assert plain.stdout.strip() not in ("", digest)


def test_a_machine_without_the_package_refuses_the_network() -> None:
    found = run(USE, None)
    assert found.returncode == 1
    assert "unknown type: found 'cube'" in found.stderr
    assert "or the package that has it on every peer" in found.stderr


ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "own-node-types"
DOCUMENT = (ROOT / "docs" / "own-node-types.md").read_text()
TRAINED = """
import sys
from pathlib import Path
import numpy as np
import dcnr
from dcnr.session.recipe import Recipe

g = dcnr.load(Path(sys.argv[1]))
x = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
rows = {"x": x, "y": np.abs(x).sum(1, keepdims=True)}
recipe = Recipe(steps=60, batch_size=32, microbatches=2, optimizer=dcnr.AdamW(lr=0.03))
trainer = dcnr.oracle.Trainer(g, recipe, rows)
losses = [result.loss for result in trainer.run(60)]
slopes = trainer.state_dict()["rectifier.weight"]
assert losses[-1] < losses[0] / 4 and np.abs(np.asarray(slopes)).max() > 0.01, (losses, slopes)

h = dcnr.Graph("python")
h.cost("mse", h.prelu(h.input("x", [4], "float32")), target="y")
assert h.definition().nodes[0].config == {"dim": 4}
"""


@pytest.fixture
def prelu(tmp_path: Path) -> Path:
    """The package of the document, from its pyproject.toml as ``pip install`` does it."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
    for module in project["tool"]["setuptools"]["py-modules"]:
        (tmp_path / f"{module}.py").write_text((EXAMPLE / f"{module}.py").read_text())
    name, version = project["project"]["name"], project["project"]["version"]
    facts = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (points,) = project["project"]["entry-points"].values()
    lines = "".join(f"{point} = {value}\n" for point, value in points.items())
    assert set(project["project"]["entry-points"]) == {GROUP}
    (facts / "entry_points.txt").write_text(f"[{GROUP}]\n{lines}")
    return tmp_path


@pytest.mark.parametrize("name", ["pyproject.toml", "dcnr_prelu.py", "check.py"])
def test_the_document_holds_the_files_of_the_example(name: str) -> None:
    bodies = re.findall(r"^```\w*\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert (EXAMPLE / name).read_text() in bodies


def test_the_package_of_the_document_does_what_the_document_says(prelu: Path) -> None:
    checked = run((EXAMPLE / "check.py").read_text(), prelu)
    assert (checked.returncode, checked.stdout) == (0, "prelu is right\n"), checked.stderr
    command = "import sys; from dcnr.cli.main import main; sys.argv[1:] = {}; main()"
    shown = run(command.format(["network", "types", "prelu"]), prelu)
    assert shown.returncode == 0, shown.stderr
    for part in ("dcnr-prelu 1.0", "weight [4]", "inferred in Python  dim"):
        assert part in shown.stdout
    file = str(EXAMPLE / "prelu.yaml")
    analysed = run(command.format(["network", "analyze", file, "--json"]), prelu)
    assert analysed.returncode == 0, analysed.stderr
    trained = run(f"import sys; sys.argv[1:] = [{file!r}]\n{TRAINED}", prelu)
    assert trained.returncode == 0, trained.stderr
    without = run(command.format(["network", "analyze", file]), None)
    assert without.returncode == 1
    assert "line 6, column 21: node 'rectifier': unknown type: found 'prelu'" in without.stderr


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("json:no_such_thing", "has no attribute 'no_such_thing'"),
        ("no_such_module:X", "No module named 'no_such_module'"),
        ("dcnr.network.catalogue.norms:TYPES", "found the name 'layernorm' taken"),
        ("dcnr.config:LIMITS", "expected a dcnr.network.node_type.NodeType"),
    ],
)
def test_an_entry_point_that_cannot_be_used_is_named(value: str, expected: str) -> None:
    with pytest.raises(UsageError, match="entry point 'mine' of a package in group") as caught:
        register_from([EntryPoint(name="mine", value=value, group=GROUP)])
    assert expected in str(caught.value)
