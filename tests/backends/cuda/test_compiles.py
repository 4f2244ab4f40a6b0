"""Every CUDA file compiles for an A100 and an H100, without a GPU, and no kernel spills registers to memory."""

import ctypes
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest

from dpnn.backends.cuda.source import OPTIONS, source

from .shim import DONE
from .verified import NVCC, NVRTC

FILES = sorted(file.name for file in files("dpnn.kernels").iterdir() if file.name.endswith(".cu"))
ARCHITECTURES = ("sm_80", "sm_90")
FLAGS = (*OPTIONS, "-ftz=true")  # the second is CuPy's own, and so is, for NVRTC,
NVRTC_FLAGS = (*FLAGS, "--device-as-default-execution-space")
_SPILLS = re.compile(
    r"Function properties for (\w+)\s.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
    re.DOTALL,
)


def by_nvcc(file: str, architecture: str, folder: Path) -> str:
    """What nvcc says about a file."""
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc on the PATH")
    text = folder / file
    text.write_text(source(file))
    line = ["nvcc", *FLAGS, "-O3", f"-arch={architecture}", "-cubin", "-Xptxas", "-v", "-o", "/dev/null", str(text)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def by_nvrtc(file: str, architecture: str, folder: Path) -> str:
    """What NVRTC, the compiler inside a process, says about a file."""
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    options = [option.encode() for option in (*NVRTC_FLAGS, f"--gpu-architecture={architecture}", "--ptxas-options=-v")]
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source(file).encode(), file.encode(), 0, None, None)
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    n = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(n))
    log = ctypes.create_string_buffer(n.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    assert status == 0, log.value.decode()
    return log.value.decode()


@cache
def _nvrtc() -> ctypes.CDLL:
    """The library of the wheel nvidia-cuda-nvrtc, which finds its second half where that is loaded."""
    found = importlib.util.find_spec("nvidia")
    folders = [Path(path) / "cu13" / "lib" for path in (found.submodule_search_locations or () if found else ())]
    for folder in folders:
        if (folder / "libnvrtc.so.13").exists():
            for half in folder.glob("libnvrtc-builtins.so*"):
                ctypes.CDLL(str(half))
            return ctypes.CDLL(str(folder / "libnvrtc.so.13"))
    pytest.skip("nvidia-cuda-nvrtc, of the extra `test`, is not installed")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("compiler", [pytest.param(by_nvcc, marks=pytest.mark.soak), by_nvrtc])
def test_kernels_compile_and_do_not_spill(
    compiler: Callable[[str, str, Path], str], file: str, architecture: str, tmp_path: Path
):
    log = compiler(file, architecture, tmp_path)
    assert "warning" not in log, log
    kernels = _SPILLS.findall(log)
    assert kernels
    assert [(name, *found) for name, frame, *found in kernels if found != ["0", "0"]] == []
    by = NVCC if compiler is by_nvcc else NVRTC
    DONE.update((file, name, by, architecture) for name, *_ in kernels)
