"""The text of a CUDA file with its includes in place: what NVRTC, nvcc and the tests' C++ compiler all read."""

import re
from functools import cache
from importlib.resources import files

OPTIONS = ("--std=c++17",)
"""What the compiler is told."""
_INCLUDE = re.compile(r'^#include "([^"]+)"\n', re.MULTILINE)


@cache
def source(file: str) -> str:
    """The text of kernels/FILE; each header once, where it is first included."""
    seen: set[str] = set()

    def read(name: str) -> str:
        text = (files("dpnn.kernels") / name).read_text(encoding="utf-8")
        return _INCLUDE.sub(lambda found: included(found[1]), text)

    def included(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        return read(name).replace("#pragma once\n", "")

    return read(file)
