# `make quickstart` and `make test` do everything on a fresh machine: set up a virtual environment in .venv with the pinned
# versions of constraints.txt, and run. To use an environment of your own: `make test VENV=path/to/venv`.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: help quickstart test test-slow lint format benchmark evaluate clean

help:
	@echo "make quickstart   load the pretrained mapex-nano, prune it for Sentinel-1, predict on real patches, draw"
	@echo "make test         run the tests but the slow ones;  make test-slow: those, of several processes"
	@echo "make lint         check style;    make format: mend it"
	@echo "make benchmark    speed side by side: transformers' ViT, reading shards, loading pruned, training"
	@echo "make evaluate     fine-tune on every task by every method and print tables (needs shards/, takes hours)"
	@echo "make clean        remove the environment, caches and outputs"

# torch first and by itself: then nothing else chooses a build of it.
$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[data,train,evaluate,lora,viz,demo,dev]"
	@touch $@

quickstart: $(VENV)/.ready
	HF_HUB_OFFLINE=1 $(BIN)/python examples/quickstart.py

test: $(VENV)/.ready
	$(BIN)/python -m pytest

test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(VENV)/.ready
	$(BIN)/python benchmarks/encoder.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/hub.py
	$(BIN)/python benchmarks/pretraining.py
	$(BIN)/python benchmarks/finetuning.py

# The model to compare with: a dense ViT-MAE, which has one expert, pretrained as mapex-nano was.
DENSE := {"norm_pix_loss": "none", "pooling_type": "mean_std", "num_experts": 1, "num_experts_per_tok": 1}

outputs/dense/model: | $(VENV)/.ready
	$(BIN)/python examples/run_pretraining.py examples/configs/nano.yaml --output_dir outputs/dense \
		--config_overrides '$(DENSE)'

# On the shards of docs/pretraining.md, below shards/: hours on two cores; what was interrupted is gone on with.
evaluate: $(VENV)/.ready outputs/dense/model
	$(BIN)/python examples/evaluate_tasks.py
	$(BIN)/python examples/evaluate_tasks.py --file examples/configs/ablations.yaml --output_dir outputs/ablations

clean:
	rm -rf .venv outputs build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
