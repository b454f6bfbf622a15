# make demo        prune a small network and write the results to out/demo
# make test        style, types and the fast tests
# make slow        the slow tests
# make benchmarks  the benchmarks, which print their tables, and then those of README.md and docs/ written anew (an hour or two)
# make reproduce   the published experiments in full (long; an interrupted run continues)
# make clean       remove what the tools left behind (the virtual environment stays)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# An installation is repeated when, and only when, what it was made from is newer than its stamp.
DATA_STAMP := $(VENV)/.installed-data
DEV_STAMP := $(VENV)/.installed-dev
INPUTS := pyproject.toml constraints.txt
# One thread for each test process: two processes already fill two cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.PHONY: demo test slow benchmarks reproduce clean

demo: $(DATA_STAMP)
	$(BIN)/nettrim demo --output out/demo

test: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2

slow: $(DEV_STAMP)
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 -m slow

benchmarks: $(DEV_STAMP)
	for name in first_layer whole_network residual_network patches calibration_samples patterns_zoo single_layers solver_study solver_curvature compaction file_sizes c_export acceleration deployment first_file tables; do \
		$(BIN)/python benchmarks/$$name.py || exit 1; done

reproduce: $(DEV_STAMP)
	for name in recovery spirals mnist-fc mnist-lenet-fc cascade-vs-parallel robustness bounds lobs network-trimming; do \
		$(BIN)/nettrim reproduce $$name --output out/reproduce || exit 1; done

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(DATA_STAMP): $(INPUTS) | $(BIN)/python
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[data,structured,fast]"
	touch $@

# What the tests need includes what the demo needs.
$(DEV_STAMP): $(INPUTS) | $(BIN)/python
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[dev]"
	touch $(DATA_STAMP) $@

clean:
	rm -rf out build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
