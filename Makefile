# Start with `make demo` and `make test`. Both install what is missing.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
NEWEST := .venv-newest
PYTEST := python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-shuffled test-gpu test-newest lock lint

demo: $(STAMP)
	$(BIN)/stableqat sweep llama/demo-study vit/demo-study
	$(BIN)/stableqat compare lightning_logs/demo-llama lightning_logs/demo-vit

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST)

# in a new random order each time; `make test-shuffled SEED=1` repeats one
SEED = $(shell date +%s)
test-shuffled: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST) --shuffle $(SEED)

# kernels and quantizers on a GPU, which `make test` does not use
test-gpu: $(STAMP)
	STABLEQAT_TEST_GPU=1 $(BIN)/python -m pytest tests/ops tests/quantizers tests/layers/test_linear.py tests/modules/test_graphed.py

lint: $(STAMP)
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/mypy src

# the newest releases that pyproject.toml allows, in a separate environment
test-newest:
	python3 -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet -e '.[dev]'
	OMP_NUM_THREADS=1 $(NEWEST)/bin/$(PYTEST)

# pins these releases if the tests pass; run it with the oldest supported Python
lock: test-newest
	$(NEWEST)/bin/python -m pip freeze --exclude-editable | sed -E '/^(nvidia|cuda|triton)/d; s/\+.*//' > constraints.txt

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[dev]' -c constraints.txt
	touch $@
