# make demo   set up, build, and see a vision-language model answer with all its visual tokens and with a part of them
# make test   set up, build, and run every check that CI runs
# make bench  the benchmarks against the peers
# Everything goes into .venv and build/; nothing else on the machine is touched.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc cmake tests/simt tests/native -type f -not -name '*.pyc' 2>/dev/null) CMakeLists.txt setup.py pyproject.toml
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test test-simt bench lint clean

demo: $(VENV)/.built
	$(BIN)/vtk demo
	$(BIN)/vtk eval --methods fastervlm,mmtok,todre --questions 120 --rounds 1

# NOTE: two workers with two threads each on two cores run many times slower than with one thread each.
test: $(VENV)/.built lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Each test of the emulation under five schedules instead of one.
test-simt: $(VENV)/.built
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m simt --simt-seeds 5

bench: $(VENV)/.built
	$(BIN)/python -m bench

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
	$(BIN)/mypy

# NOTE: --no-build-isolation builds against the torch just installed; an isolated build would download another one.
$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	CMAKE_ARGS="-DVTK_WERROR=ON -DVTK_SIMT=ON -DVTK_SANITIZE=ON $(CMAKE_ARGS)" $(BIN)/python -m pip install --no-build-isolation --no-deps -e .
	$(BIN)/vtk env
	touch $@

# NOTE: timm requires torchvision, which the tests do without: PyPI's is for CUDA and does not load beside a CPU torch.
$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -r requirements.txt
	$(BIN)/python -m pip install --no-deps timm==1.0.20
	touch $@

clean:
	rm -rf $(VENV) build python/vtkernels/lib python/*.egg-info
