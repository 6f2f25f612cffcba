# make demo and make test are all that a newcomer types. Everything else: `make help`.
#
# .venv is made on first use. A torch that the Python already has is reused (PYTHON=/path/to/python chooses it);
# otherwise the pinned one is installed. The -gpu targets use the Python that holds the CUDA torch, and download nothing:
#     make PYTHON=python3 test-gpu bench-gpu

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
TORCH  := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

.PHONY: help demo docs test faults fuzz check kernels bench wheel test-gpu sanitize-gpu bench-gpu install-gpu clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*##/ -/' | sort

demo: $(READY)  ## train a 32-layer network without normalisation on real digits, and time its step
	$(BIN)/isonet-fast demo

test: $(READY)  ## the whole suite, on the CPU
	$(BIN)/python -m pytest tests --numprocesses 2 --dist worksteal

faults: $(READY)  ## kill runs, fill disks, damage files: what a fault costs (under five minutes; docs/reliability.md)
	$(BIN)/python -m tests.faults

fuzz: SECONDS := 60
fuzz: $(READY)  ## random trials of everything public, on two cores; SECONDS=1800 makes about a million
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) --workers 2

check: $(READY)  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

kernels: $(READY)  ## compile every kernel without a GPU: registers, spills, tensor-core instructions
	$(BIN)/python tools/kernels.py

bench: $(READY)  ## the CPU lines of the performance targets
	$(BIN)/python -m benchmarks.run_all --device cpu

docs: $(READY)  ## the documentation site: build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# For every architecture, where other builds are for the GPU in this machine.
wheel: $(READY)  ## dist/*.whl, with CUDA kernels for every architecture (with a CUDA torch, or ISONET_FAST_CUDA=1)
	ISONET_FAST_CUDA_ARCHS=release $(BIN)/python -m build --wheel --no-isolation
	$(BIN)/python tools/wheel_architectures.py dist/*.whl

# The -gpu targets need a GPU that PyTorch can use: without one they say so, and do nothing at all.
GPU_TARGETS := $(filter test-gpu sanitize-gpu bench-gpu,$(MAKECMDGOALS))
ifneq ($(GPU_TARGETS),)
  WHY_NOT := $(shell $(PYTHON) tools/why_not_gpu.py $(GPU_TARGETS) 2>/dev/null)
  ifneq ($(WHY_NOT),none)
    $(error $(or $(WHY_NOT),$(PYTHON) does not run))
  endif
  MAKEFLAGS += --keep-going  # benchmarks are made after a failing test too; make still ends with an error
endif
.NOTPARALLEL:  # nothing may disturb a benchmark

# A GPU machine may be offline and its torch is not ours to replace: nothing is downloaded.
DEMAND := ISONET_FAST_KERNELS=1 ISONET_FAST_CUDA=1
install-gpu:
	$(DEMAND) $(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --no-index --editable . \
	  || $(DEMAND) $(PYTHON) setup.py build_ext --inplace \
	  || echo "NO CUDA KERNELS, see above: PyTorch serves SReLU"

# The clocks are tested first: other tests would take turns with them on the GPU.
CLOCKS := tests/benchmarks/test_clocks.py
test-gpu: install-gpu  ## the op, layer and kernel tests on the GPU, at most 170 seconds
	@status=0; \
	timeout --signal=INT --kill-after=10 20 $(PYTHON) -m pytest --device cuda $(CLOCKS) || status=$$?; \
	timeout --signal=INT --kill-after=10 140 $(PYTHON) -m pytest --device cuda tests --ignore $(CLOCKS) \
	  --continue-on-collection-errors \
	  $$($(PYTHON) -c 'import xdist' 2>/dev/null && echo --numprocesses 4 --dist worksteal) || status=$$?; \
	exit $$status

# Memory that PyTorch caches would hide an access outside a tensor.
sanitize-gpu: install-gpu  ## compute-sanitizer's memcheck and racecheck over the kernels' tests, at most eight minutes
	@status=0; for tool in memcheck racecheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --signal=INT --kill-after=10 230 compute-sanitizer --tool $$tool \
	    --error-exitcode 9 $(PYTHON) -m pytest --device cuda tests/csrc/test_kernels.py \
	    tests/kernels/test_triton_orthogonality.py -k 'not graph and not loss_and_gradients_match' || status=$$?; \
	done; exit $$status

SECONDS := 380
bench-gpu: install-gpu  ## every performance target in SECONDS=380 (with test-gpu: ten minutes; 560 measures more)
	timeout $$(($(SECONDS) + 10)) $(PYTHON) -m benchmarks.run_all --device cuda --seconds $(SECONDS)

# A file is the record of a finished environment: an interrupted one is made again. (torch.pth: if $(PYTHON) is itself of
# a virtual environment, "system" packages are not its own but those below it.)
$(READY): pyproject.toml constraints.txt setup.py $(wildcard CMakeLists.txt csrc/*)
	@if ! $(BIN)/python -c '' 2>/dev/null; then \
	  if $(PYTHON) -c 'import torch' 2>/dev/null; then \
	    echo "reusing the torch of $(PYTHON)"; $(PYTHON) -m venv --system-site-packages $(VENV); \
	    $(PYTHON) -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' > $(VENV)/torch.pth; \
	    mv $(VENV)/torch.pth $(VENV)/lib/python*/site-packages; \
	  else $(PYTHON) -m venv $(VENV); fi; fi
	@$(BIN)/python -c 'import torch' 2>/dev/null || { echo "installing $(TORCH)"; \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) 'numpy<2.4'; }
	@$(BIN)/python -c 'import torch; print("torch==" + torch.__version__.split("+")[0])' > $(VENV)/torch.txt
	@# the Triton that a torch came with is the one that it needs
	@grep -vE "^(torch$$($(BIN)/python -c 'import triton' 2>/dev/null && echo '|triton'))==" constraints.txt \
	  >> $(VENV)/torch.txt
	@echo "installing the rest and building the kernels"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(VENV)/torch.txt \
	  triton || echo "no Triton for this machine: its kernels are not tested"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(VENV)/torch.txt \
	  'setuptools>=64' wheel ninja $$(command -v cmake >/dev/null || echo cmake)
	@export PATH="$(CURDIR)/$(BIN):$$PATH"; $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint $(VENV)/torch.txt --no-build-isolation --editable '.[demo,dev]'
	@$(BIN)/isonet-fast info
	@touch $@

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info isonet_fast/_C.so
