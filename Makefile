# Two commands for a newcomer: `make demo` and `make test`. Both install what is missing, once.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
NEWEST := .venv-newest
PYTEST := python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-shuffled test-gpu test-newest lock lint

demo: $(STAMP)
	$(BIN)/stableqat sweep configs/llama/demo-study.yaml configs/vit/demo-study.yaml
	$(BIN)/stableqat compare lightning_logs/demo-llama lightning_logs/demo-vit

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST)

# in random order, another one each time: `make test-shuffled SEED=1` repeats one
SEED = $(shell date +%s)
test-shuffled: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST) --shuffle $(SEED)

# the kernels and quantizers on a GPU; `make test` sees none
test-gpu: $(STAMP)
	STABLEQAT_TEST_GPU=1 $(BIN)/python -m pytest tests/ops tests/quantizers tests/layers/test_linear.py

lint: $(STAMP)
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/mypy src

# the newest releases that pyproject.toml allows, in an environment of their own
test-newest:
	python3 -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet -e '.[dev]'
	OMP_NUM_THREADS=1 $(NEWEST)/bin/$(PYTEST)

# they are what is installed from now on, if the tests pass; run it with the oldest Python that is supported
lock: test-newest
	$(NEWEST)/bin/python -m pip freeze --exclude-editable | sed -E '/^(nvidia|cuda|triton)/d; s/\+.*//' > constraints.txt

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[dev]' -c constraints.txt
	touch $@
