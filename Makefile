# Every target installs what it needs into .venv, from the package registries alone; later calls find it there.
# On a machine with a GPU, choose the build of torch: make demo TORCH="torch --index-url ..." (any torch >= 2.8).
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
# The workers of pytest-xdist share two cores: more threads than cores make everything slower.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help demo survey test test-all coverage check snapshots docs results setup locked clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.ready ## create .venv and install dvar for development

# What the demo needs and no more; `make setup` adds the rest.
$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dvar needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Set PYTHON=... to another one.")'
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch and what trains with it into $(VENV), once: minutes, by the network"
	$(RUN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train]'
	touch $@

$(VENV)/.ready: $(VENV)/.demo
	@echo "installing what development needs beside it, once"
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.demo ## personalise a bundled concept on the bundled model, in a few minutes
	env -u OMP_NUM_THREADS $(RUN)/dvar demo

# One mug, learned until DVAR stops and up to the cap. The first time this trains for about 15 minutes; when
# interrupted, the next call continues from the last checkpoint.
MUG = --instance_data_dir src/dvar/mini/concepts/red_striped_mug --initializer_token mug
runs/survey-%/result.json: | setup
	env -u OMP_NUM_THREADS $(RUN)/dvar train textual-inversion $(MUG) --output_dir $(@D) $(FLAGS) \
	  $(if $(wildcard $(@D)/checkpoint-*),--resume_from_checkpoint latest,--overwrite)
runs/survey-full/result.json: FLAGS = --threshold 1e-9 --probe_every 25
runs/survey/survey.json: runs/survey-stopped/result.json runs/survey-full/result.json
	env -u OMP_NUM_THREADS $(RUN)/dvar survey build $(^D) --output_dir $(@D) --baseline "full training"

survey: runs/survey/survey.json ## train two runs and serve a survey that compares them
	$(RUN)/dvar survey serve $(<D)

test: setup ## run the tests, without the slow ones
	$(RUN)/python -m pytest -n 2 -m "not slow"

test-all: setup ## run all tests
	$(RUN)/python -m pytest -n 2

coverage: setup ## run the tests and print the lines and branches that they reach
	$(RUN)/python -m pytest -n 2 -m "not slow" --cov --cov-report=term

check: setup ## run ruff, mypy and the rules of imports and language
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/python -m pytest tests/test_architecture.py

snapshots: setup ## write tests/snapshots/ again, after a message was changed on purpose
	DVAR_REWRITE_SNAPSHOTS=1 $(RUN)/python -m pytest tests/test_messages.py

docs: setup ## write the generated pages and build the documentation into site/; any warning fails
	$(RUN)/python docs/build/verdicts.py
	$(RUN)/python docs/build/performance.py
	$(RUN)/python docs/build/scale.py
	$(RUN)/python docs/build/memory.py
	$(RUN)/python docs/build/readme.py
	$(RUN)/python docs/build/held_loss.py
	$(RUN)/python docs/build/commands.py
	$(RUN)/python docs/build/notebooks.py
	$(RUN)/zensical build --clean --strict
	$(RUN)/python docs/build/check_site.py

# The recorded runs go to the folder "records" and are recorded once, in eleven core-minutes each; when interrupted, the
# next call continues. The experiments' own runs take three hours more, the true runs a quarter of an hour.
TUNING = brown_boot pink_checked_house purple_cat turquoise_dog
results: setup ## record runs, reproduce the paper's tables and figures, and write docs/results.md
	$(RUN)/dvar record --first 6
	$(RUN)/dvar record --concepts $(TUNING) --seeds 0 1 2
	$(RUN)/dvar reproduce all
	$(RUN)/python docs/build/results.py runs/laboratory
	cp runs/laboratory/traces.npz docs/traces.npz

locked: setup ## write locked.txt: the versions of constraints.txt, with the SHA-256 of each of their files
	$(RUN)/python -m pip install --quiet --disable-pip-version-check uv
	$(RUN)/uv pip compile constraints.txt --quiet --generate-hashes --no-deps --universal --python-version 3.11.5 \
	  --no-annotate --custom-compile-command "make locked" --output-file locked.txt

clean: ## remove .venv and all caches
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .hypothesis
