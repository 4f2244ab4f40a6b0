"""Installed from the folder, from a wheel, or in place, dpnn has its kernels, its command and its licence."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOOK = """
import json
from importlib import metadata, resources
from importlib.util import find_spec
kernels = resources.files("dpnn.kernels")
kinds = (".cu", ".cuh", ".h", ".c")
print(json.dumps({
    "kernels": {file.name: file.read_text() for file in kernels.iterdir() if file.name.endswith(kinds)},
    "compiled": find_spec("dpnn.kernels._cpu_baseline") is not None,
    "commands": [command.value for command in metadata.distribution("dpnn").entry_points],
    "licence": metadata.metadata("dpnn")["License-Expression"],
}))
"""

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("pip", "setuptools")),
    reason="pip and setuptools, which build a package without the network, are not installed here",
)


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip(sys.executable, "wheel", "--wheel-dir", folder, source)
    (built,) = folder.glob("dpnn-*.whl")
    return built


def pip(python: Path | str, *args: object) -> None:
    """pip for another Python, with this one's setuptools, without the network and without dependencies."""
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    line = [sys.executable, "-m", "pip", "--python", str(python), str(args[0]), *offline, *map(str, args[1:])]
    env = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib"), "PIP_FIND_LINKS": ""}
    done = subprocess.run(line, capture_output=True, text=True, env=env, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("way", ["wheel", "folder", "editable"])
def test_an_installed_dpnn_is_complete(way, source, wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True, timeout=100)
    python = tmp_path / "env" / "bin" / "python"
    what = {"wheel": [wheel], "folder": [source], "editable": ["--editable", source]}[way]
    pip(python, "install", "--ignore-installed", *what)

    looked = subprocess.run(
        [python, "-c", LOOK], capture_output=True, text=True, cwd=tmp_path, timeout=100, check=False
    )
    assert looked.returncode == 0, looked.stderr
    found = json.loads(looked.stdout)
    files = [file for file in (ROOT / "kernels").iterdir() if file.suffix in (".cu", ".cuh", ".h", ".c")]
    assert found["kernels"] == {file.name: file.read_text() for file in files}
    assert files
    assert found["compiled"] == (shutil.which("gcc") is not None)
    assert found["commands"] == ["dpnn.cli:main"]
    assert found["licence"] == "Apache-2.0"

    # What dpnn needs is this environment's; dpnn itself is the one that was just installed.
    env = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}
    said = subprocess.run(
        [python.with_name("dpnn"), "--help"],
        capture_output=True,
        text=True,
        env=env,
        cwd=tmp_path,
        timeout=100,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    assert "launch" in said.stdout


def test_the_container_is_built_from_the_same_files(source):
    text = (ROOT / "jobs" / "dpnn.def").read_text()
    files = text.partition("%files\n")[2].partition("\n\n")[0].splitlines()
    made = {"build", "dpnn.egg-info"}  # by the builds above
    assert {line.split()[0] for line in files} == {file.name for file in source.iterdir()} - made
    assert {line.split()[1] for line in files} == {"/opt/source/"}
