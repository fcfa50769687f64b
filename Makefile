# make demo   sets everything up and runs the main job on a small real model, down to a report
# make test   sets everything up and runs the whole suite
# make wheel  builds one, and tries it in an environment of its own
# make docs   builds the pages in build/docs, and checks their links
# make gpu    on a machine with a GPU: builds for it, tests and measures there, in ten minutes, fetching nothing
# make lint   formatting and style;  make bench   kernels against torch;  make clean
#
# PYTHON=python3.12 picks the interpreter, TORCH=torch==2.12.0 the torch to install where there is none, JOBS=1 how many
# tests run at a time.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0+cpu
# A process of some hundred megabytes for each, of files that mostly wait for the longest one: more than 8 gain nothing.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
BIN = $(VENV)/bin
INPUTS = setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)

CLEAN = build/clean
EXAMPLE = --model mpqkern.cli.example:net --data mpqkern.cli.example:batches

.PHONY: demo test lint bench gpu wheel docs clean

demo: $(VENV)/.installed
	$(BIN)/python bench/demo.py

# File by file, since what a file builds serves all its tests, and in the order of their names: test_builds.py takes
# longest, and is one of the first.
test: $(VENV)/.installed lint
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.inl' 'csrc/*.cu' 'csrc/*.cuh' 2>/dev/null || find csrc -type f)

bench: $(VENV)/.installed
	$(BIN)/python bench/linear.py

# With the interpreter that has torch; OUT=folder takes the results.
gpu:
	$(PYTHON) bench/gpu.py $(if $(OUT),--out $(OUT))

wheel: $(VENV)/.installed
	rm -rf build/wheel $(CLEAN)
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w build/wheel .
	$(MAKE) VENV=$(CLEAN) $(CLEAN)/.torch
	$(CLEAN)/bin/python -m pip install -q build/wheel/*.whl
	cd $(CLEAN) && bin/mpqkern env && bin/mpqkern score $(EXAMPLE) && bin/mpqkern solve --avg-bits 4 \
	  && bin/mpqkern apply && bin/mpqkern verify && bin/mpqkern report

# Warnings are errors: a link or an anchor that leads nowhere is one.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo build/docs/index.html

# The virtual environment sees the system's packages when one of them is a torch that we can build on.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is too old; wanted Python >= 3.10 (PYTHON=...)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' || { echo "$(PYTHON) has no venv; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	if $(PYTHON) -c 'import torch, sys; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))' 2>/dev/null; \
	  then $(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi

# The pinned CPU build where pip can find it, else that version's default build.
$(VENV)/.torch: | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --upgrade "setuptools>=77" "cmake>=3.24" ninja pybind11
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install -q $(TORCH) \
	  || $(BIN)/python -m pip install -q $(patsubst %+cpu,%,$(TORCH))
	@touch $@

# Without transformers and ONNX Runtime their tests are skipped.
$(VENV)/.installed: $(VENV)/.torch $(INPUTS)
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[test,demo,ecosystem]' \
	  || $(BIN)/python -m pip install -q --no-build-isolation -e '.[test,demo]'
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[docs]'
	@touch $@

clean:
	rm -rf build mpqkern/_C.so mpqkern/_host*.so mpqkern.egg-info $(VENV)
