# Set-up needs Python 3.11 or 3.12 and a network to PyPI; nothing is installed outside .venv.
PYTHON ?= python3
BIN := .venv/bin
MODEL := models/SmolLM2-135M-Instruct
# One process with both cores: all parameters are trained, and exchanging their gradients would cost more than it gains.
FINETUNE := model.path=$(MODEL) train.num_workers=1 train.cpus_per_worker=2 data.utility.max_rows=40

.PHONY: demo test test-fast model papers clean
.DELETE_ON_ERROR:

demo: model            ## teach a real model fictitious authors, make it forget some, show the proof
	@echo "Demo 1 of 4: write the data (seconds)"
	$(BIN)/ray-unlearn make-data outputs/demo-data --authors 20 --questions 3 --forget 3 --seed 0
	@echo "Demo 2 of 4: teach the model 20 authors (about 3 minutes)"
	$(BIN)/ray-unlearn finetune demo $(FINETUNE) output_dir=outputs/demo-target
	@echo "Demo 3 of 4: retrain without the 3 authors, for comparison (about 3 minutes)"
	$(BIN)/ray-unlearn finetune demo $(FINETUNE) output_dir=outputs/demo-oracle "finetune.sets=[retain,utility]"
	@echo "Demo 4 of 4: forget the 3 authors, attack the result, write the page (about 7 minutes)"
	$(BIN)/ray-unlearn run demo

test: .venv/.test model  ## everything CI checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/pytest --durations=40

test-fast: .venv/.test model  ## the inner loop: style, types, and the tests without a Ray cluster
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/pytest -m "not ray"

papers: .venv/.test model  ## both papers' experiments, all arms: docs/papers.md
	$(BIN)/python -m tests.benchmarks.papers

model: $(MODEL)/config.json  ## SmolLM2-135M-Instruct as a plain model folder

$(MODEL)/config.json: .venv/.base
	$(BIN)/python -m tests.fetch_model $(MODEL)

# torch first and alone: a range or a dependency's wish would pull another build.
.venv/.base: pyproject.toml constraints.txt
	@echo "Install everything into .venv (about 2 minutes)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[demo]"
	touch $@

.venv/.test: .venv/.base
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[cluster,demo,dev]"
	touch $@

clean:                 ## remove runs; the environment and the model stay
	rm -rf outputs
