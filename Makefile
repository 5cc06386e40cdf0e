# `make demo` and `make test` do all of their own set-up, in .venv, from the package registries alone; the second time it takes no time.
# On a machine with a GPU: make demo TORCH="torch --index-url ..." (any build of torch >= 2.6).
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
# Two cores are shared by pytest-xdist's workers: more threads than cores make everything slower.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo survey test test-all check docs results setup clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dvar needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Set PYTHON=... to another one.")'
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	env -u OMP_NUM_THREADS $(RUN)/dvar demo

# The same mug learned by DVAR and up to the cap, and the two compared in a browser; the first time it trains for some 15 minutes.
# Interrupted, it goes on from the last checkpoint.
MUG = --instance_data_dir src/dvar/mini/concepts/red_striped_mug --initializer_token mug
runs/survey-%/result.json: | setup
	env -u OMP_NUM_THREADS $(RUN)/dvar train textual-inversion $(MUG) --output_dir $(@D) $(FLAGS) \
	  $(if $(wildcard $(@D)/checkpoint-*),--resume_from_checkpoint latest,--overwrite)
runs/survey-full/result.json: FLAGS = --threshold 1e-9 --probe_every 25
runs/survey/survey.json: runs/survey-stopped/result.json runs/survey-full/result.json
	env -u OMP_NUM_THREADS $(RUN)/dvar survey build $(^D) --output_dir $(@D) --baseline "full training"

survey: runs/survey/survey.json
	$(RUN)/dvar survey serve $(<D)

test: setup
	$(RUN)/python -m pytest -n 2 -m "not slow"

test-all: setup
	$(RUN)/python -m pytest -n 2

check: setup
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/python -m pytest tests/test_house.py

docs: setup
	$(RUN)/python docs/verdicts.py
	$(RUN)/python docs/reference.py
	$(RUN)/python docs/performance.py

# The page of results, and the runs that it is read off: made once, in the folder "records", eleven core-minutes a run, and gone on
# with after a kill.  The runs that experiments make of their own take three hours more, the true runs a quarter of one.
TUNING = brown_boot pink_checked_house purple_cat turquoise_dog
results: setup
	$(RUN)/dvar record --first 6
	$(RUN)/dvar record --concepts $(TUNING) --seeds 0 1 2
	$(RUN)/dvar reproduce all
	$(RUN)/python docs/results.py runs/laboratory
	cp runs/laboratory/traces.npz docs/traces.npz

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
