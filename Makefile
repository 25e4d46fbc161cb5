# `make figures` and `make test` set up everything they need in .venv; `make help` lists the rest.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# nproc takes OMP_NUM_THREADS for the number of cores.
CORES ?= $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || sysctl -n hw.ncpu)
SCALE ?= laptop
FROM ?= store

NOTEBOOKS := $(sort $(wildcard notebooks/[0-9][0-9]_*.ipynb))
# The lab's runs are small: one thread a process and a process a core is faster than threads.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1
export S2D_WORKERS ?= $(CORES)
# Results of tests and nbval go here, not over the committed ones.
TEST_OUTPUT := $(CURDIR)/build/test
SOURCES := $(shell find s2d -name '*.py') $(wildcard data/paper/*.csv) $(wildcard data/laptop/checkpoints/*.safetensors)

.PHONY: help figures paper notebooks-on-gpu test coverage test-kernels notebooks book refresh replay fetch bench lint format setup clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14
	@echo
	@echo "variables:  SCALE=smoke|laptop|gpu|paper   FROM=store|scratch   CORES=$(CORES)"
	@echo "            IMAGENET= GSM8K= DOLCI= and PROFILE=local|slurm|kubernetes|cluster-generic of SCALE=paper (REPRODUCING.md)"
	@echo "            TORCH_BACKEND=cpu|cu128|... in the set-up (another torch than the registry's, which brings CUDA)"

# --- set-up -----------------------------------------------------------------------------------------------------------
# pip takes the registry's torch, which on Linux brings CUDA; uv knows where each other build of torch is.
INSTALL = $(if $(TORCH_BACKEND),$(PY) -m uv pip install --quiet --python $(PY) --torch-backend $(TORCH_BACKEND),$(PY) -m pip install --quiet --disable-pip-version-check)

# The stamp carries the result: it is written last, so an interrupted installation starts again.
$(VENV)/installed: pyproject.toml constraints.txt
	@echo "setting up $(VENV) with $$($(PYTHON) --version) (a few minutes, several GB with the CUDA build of torch)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one with PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_BACKEND),$(PY) -m pip install --quiet --disable-pip-version-check uv)
	$(INSTALL) -c constraints.txt -e '.[lab,dev,integrations,int8,models,train,book,cluster]'
	@touch $@

setup: $(VENV)/installed ## install everything into .venv (the other targets do it themselves)

# --- the main job -----------------------------------------------------------------------------------------------------
SNAKEMAKE = $(PY) -m snakemake --cores $(CORES) --config scale=$(SCALE) from=$(FROM) --rerun-incomplete --quiet rules

figures: $(VENV)/installed $(if $(filter paper,$(SCALE)),notebooks-on-gpu paper) ## run the notebooks as a batch and draw every figure (SCALE=, FROM=scratch retrains)
	@# A killed run leaves its lock behind; only this Makefile starts Snakemake here, so the lock is not another run's.
	@$(SNAKEMAKE) --unlock >/dev/null 2>&1 || true
	$(SNAKEMAKE)

# The paper's tables with the paper's networks: where its data is, and which of it to make.
PROFILE ?= local
DATA = $(foreach name,IMAGENET IMAGENET_SPLIT GSM8K DOLCI,$(if $($(name)),$(name)=$($(name))))
PAPER = $(PY) -m s2d.lab.paper_scale
BATCH = $(PY) -m snakemake --snakefile paper/Snakefile --workflow-profile profiles/$(PROFILE)

paper: $(VENV)/installed ## the paper's own tables, a job a GPU (IMAGENET=, PROFILE=slurm, TABLES="6 11", SEEDS="0 1")
	$(BATCH) $(OPTIONS) --config $(if $(SEEDS),'seeds=$(SEEDS)') $(if $(TABLES),'tables=$(TABLES)') $(DATA) $(CONFIG)
	$(PAPER) show

notebooks-on-gpu: $(VENV)/installed
	$(PAPER) check --gpu --config paper/paper.yaml $(DATA)

# --- tests ------------------------------------------------------------------------------------------------------------
test: $(VENV)/installed ## unit tests and doctests, then nbval on every notebook that changed since it last passed
	S2D_OUTPUT=$(TEST_OUTPUT) $(PY) -m pytest -n $(CORES) --dist loadfile -q
	@$(MAKE) --no-print-directory -j$(CORES) notebooks

# What could depend on how a processor rounds, and the settings beside the plain one (native kernels, one thread) of
# `make test`: torch's kernels (default, avx2, avx512, native) and the number of threads, which wait without spinning:
# on a busy machine most of the time would go there.
NUMERIC := bound cap erq judge layers outliers pcdr prepare ptq ptq4vit qat quantizers reference regularizer repq_vit \
  rotation smoothquant spectral watch
KERNELS ?= default-1 native-2

test-kernels: $(KERNELS:%=test-kernels-%) ## the numeric tests on other kernels and threads (KERNELS="avx2-1 native-2")

# What the core's own tests and doctests run of it, the lines of other processes not counted.
CORE := api attachment bad_calls bound cap diagnosis estimate files layers outliers pcdr reference regularizer spectral watch
COVERED ?= 93

coverage: $(VENV)/installed ## which lines of the core its tests run; fails below COVERED=93 per cent
	$(PY) -m pytest -q -n $(CORES) --dist loadfile --cov --cov-report=term-missing:skip-covered --cov-fail-under=$(COVERED) \
	  $(CORE:%=tests/test_%.py) $(wildcard s2d/*.py)

test-kernels-%: kernel = $(firstword $(subst -, ,$*))
test-kernels-%: threads = $(lastword $(subst -, ,$*))
test-kernels-%: $(VENV)/installed
	@echo "== the numeric tests with $(kernel) kernels and $(threads) threads"
	$(if $(filter-out native,$(kernel)),ATEN_CPU_CAPABILITY=$(kernel)) OMP_NUM_THREADS=$(threads) MKL_NUM_THREADS=$(threads) \
	  OMP_WAIT_POLICY=PASSIVE \
	  $(PY) -m pytest -n $$(( ($(CORES) + $(threads) - 1) / $(threads) )) --dist loadfile -q $(NUMERIC:%=tests/test_%.py)

# The longest first, so that no core waits for it in the end.
LONGEST := $(patsubst %,notebooks/%.ipynb,05_ptq_evaluation 01_outlier_origins)

notebooks: $(patsubst notebooks/%.ipynb,build/nbval/%,$(LONGEST) $(filter-out $(LONGEST),$(NOTEBOOKS))) ## nbval on every notebook that changed since it last passed

build/nbval/%: notebooks/%.ipynb $(SOURCES) | $(VENV)/installed
	@mkdir -p $(@D)
	S2D_OUTPUT=$(TEST_OUTPUT) S2D_WORKERS=1 $(PY) -m pytest -q -p no:cacheprovider --nbval-lax --nbval-current-env --nbval-cell-timeout=900 $<
	@touch $@

# --- the web edition --------------------------------------------------------------------------------------------------
book: $(VENV)/installed ## the web edition in build/book, from the stored outputs, without a network
	$(PY) -m s2d.lab.book build/book

# --- keeping the repository's own results true -------------------------------------------------------------------------
refresh: $(NOTEBOOKS:notebooks/%.ipynb=build/refresh/%) ## re-execute notebooks at the defaults and store their outputs

# Later notebooks read tables that earlier ones write, so they follow one another.

build/refresh/%: notebooks/%.ipynb $(SOURCES) | $(VENV)/installed
	@mkdir -p $(@D)
	$(PY) -m s2d.lab.notebook refresh $<
	@touch $@

replay: $(VENV)/installed ## does the edited code train the same, bit for bit, as that of AGAINST=<commit>? (CONTRIBUTING.md)
	$(PY) -m s2d.lab.replay --against $(or $(AGAINST),$(error name a commit: make replay AGAINST=main))

fetch: $(VENV)/installed ## the checkpoints that are not committed, from the release or S2D_ASSETS=<address or folder>
	$(PY) -m s2d.lab.publish fetch

bench: $(VENV)/installed ## side-by-side timings
	@for script in $(filter-out benchmarks/common.py benchmarks/costs.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; $(PY) $$script || exit 1; done

lint: $(VENV)/installed ## ruff on code and notebooks, mypy on the core, and the static notebook check
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(PY) -m s2d.lab.notebook check $(NOTEBOOKS)

format: $(VENV)/installed ## let ruff format everything
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## remove what was built (not .venv, not committed results)
	rm -rf build .snakemake
