"""Which backend a run takes, what it says when the fast one can't be had, and what is refused."""

import shutil
import subprocess
from types import SimpleNamespace

import pytest

from dpnn import cli
from dpnn.backends.onednn import OneDNN
from dpnn.observe import metrics

INSTALL = "`pip install onednn-cpu-gomp`"
FOREIGN_ELF = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00\xb7\x00\x01\x00\x00\x00" + bytes(40)
"""The header of a shared library for AArch64."""
OLD = """
typedef struct { int major, minor, patch; } version;
const version *dnnl_version(void) { static version old = {2, 7, 1}; return &old; }
"""


@pytest.fixture
def ready(images, tmp_path):
    """A job of one epoch over little data: `path`, `start()` (the first line of its metrics), `events()`."""
    path, out = tmp_path / "job.toml", tmp_path / "run"
    text = f"""
[data]
train = "{images}/train"
[model]
name = "lenet"
kernel = 3
[train]
steps = 2
global_batch = 16
[optimizer]
lr = 0.01
[output]
dir = "{out}"
"""
    path.write_text(text)
    lines = lambda: metrics.read(out / "metrics.jsonl")  # noqa: E731
    return SimpleNamespace(path=path, out=out, lines=lines)


@pytest.fixture(params=["missing", "foreign", "old", "nothing"])
def unusable(request, tmp_path, monkeypatch) -> str:
    """DPNN_ONEDNN names something that can't be used; what is said of it."""
    file = tmp_path / "libdnnl.so.3"
    said = {
        "missing": "cannot open shared object file",
        "foreign": "libdnnl.so.3",
        "old": "is version 2.7.1, 3.x is needed",
        "nothing": "dnnl_version",
    }
    if request.param == "foreign":
        file.write_bytes(FOREIGN_ELF)
    elif request.param in ("old", "nothing"):
        if shutil.which("gcc") is None:
            pytest.skip("gcc, which makes the library, is missing")
        source = tmp_path / "library.c"
        source.write_text(OLD if request.param == "old" else "int nothing;")
        subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", file], check=True, timeout=60)
    monkeypatch.setenv("DPNN_ONEDNN", str(file))
    return said[request.param]


def test_a_run_says_which_library_it_computes_with(ready):
    assert cli.main(["train", str(ready.path)]) == 0
    start = ready.lines()[0]
    assert start["backend"].startswith("onednn")
    assert start["library"].startswith("oneDNN 3.")
    assert "libdnnl" in start["library"]


def test_auto_says_in_one_line_that_it_takes_the_reference(ready, unusable, capfd):
    assert cli.main(["train", str(ready.path)]) == 0
    told = [line for line in "".join(capfd.readouterr()).splitlines() if "reference backend" in line]
    assert len(told) == 1
    assert unusable in told[0]
    assert INSTALL in told[0]
    lines = ready.lines()
    assert lines[0]["backend"] == "reference"
    assert [line["event"] for line in lines if line["kind"] == "event"].count("slow_backend") == 1


def test_asked_for_by_name_it_ends_the_job_and_says_how_to_install(ready, unusable, capfd):
    assert cli.main(["train", str(ready.path), "--set", "backend.name=onednn"]) == 2
    said = capfd.readouterr().err
    assert said.count("dpnn:") == 1
    assert unusable in said
    assert INSTALL in said


@pytest.mark.mpi
def test_two_ranks_say_it_once(ready, mpirun):
    done = mpirun(2, "train", ready.path, "--set", "backend.name=onednn", env={"DPNN_ONEDNN": "/absent/libdnnl.so.3"})
    assert done.returncode == 2
    assert done.stderr.count("pip install onednn-cpu-gomp") == 1


def test_float64_is_the_references(ready, capfd):
    asked = ["--set", "backend.name=onednn", "--set", "backend.precision=float64"]
    assert cli.main(["train", str(ready.path), *asked]) == 2
    assert 'backend.name = "onednn" computes in "float32" or "bfloat16"; use "auto"' in capfd.readouterr().err
    assert cli.main(["train", str(ready.path), "--set", "backend.precision=float64"]) == 0
    assert ready.lines()[0]["backend"] == "reference"


def test_bfloat16_is_refused_where_the_processor_has_none(ready, capfd, monkeypatch):
    monkeypatch.setattr("dpnn.backends.onednn.library._AMX", 1 << 30)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert cli.main(["train", str(ready.path), "--set", "backend.precision=bfloat16"]) == 2
    assert "has no bfloat16" in capfd.readouterr().err
    more = ["--set", "backend.name=reference", "--set", "backend.precision=bfloat16"]
    assert cli.main(["train", str(ready.path), *more]) == 2
    assert 'backend.name = "reference" computes in "float32" or "float64"' in capfd.readouterr().err


def test_a_resumed_run_takes_the_choices_of_its_folder(ready, monkeypatch):
    asked = []
    monkeypatch.setattr("dpnn.backends.onednn.conv._TRIVIAL", 0)
    assert cli.main(["train", str(ready.path)]) == 0
    choices = (ready.out / "choices.json").read_text()
    assert "forward" in choices
    monkeypatch.setattr("dpnn.backends.onednn.choices.Choices._read", lambda self: {})
    monkeypatch.setattr("dpnn.backends.onednn.conv.Kit.time", lambda *args: asked.append(args) or 1.0)
    assert cli.main(["train", "--resume", str(ready.out), "--set", "train.steps=3"]) == 0
    assert asked == []
    assert (ready.out / "choices.json").read_text() == choices


def test_a_smaller_processor_computes_the_same(ready, python, monkeypatch):
    assert cli.main(["train", str(ready.path)]) == 0
    here = [line["loss"] for line in ready.lines() if line["kind"] == "step"]
    shutil.rmtree(ready.out)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    done = python("-m", "dpnn", "train", ready.path)
    assert done.returncode == 0, done.stderr
    lines = ready.lines()
    assert "SSE4.1" in lines[0]["library"]
    assert [line["loss"] for line in lines if line["kind"] == "step"] == pytest.approx(here, rel=1e-4)


def test_threads_of_a_rank_are_those_of_its_kernels(ready, monkeypatch):
    made = []
    original = OneDNN.__init__
    monkeypatch.setattr(OneDNN, "__init__", lambda self, *args: (original(self, *args), made.append(self))[0])
    assert cli.main(["train", str(ready.path), "--set", "backend.threads=1"]) == 0
    assert made
    assert all(backend.kernels.threads == 1 for backend in made)
