# Two commands for a newcomer: `make demo` and `make test`. Both install what is missing, once.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: demo test test-gpu lint

demo: $(STAMP)
	$(BIN)/stableqat sweep configs/llama/demo-study.yaml configs/vit/demo-study.yaml
	$(BIN)/stableqat compare lightning_logs/demo-llama lightning_logs/demo-vit

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# the kernels and quantizers on a GPU; `make test` sees none
test-gpu: $(STAMP)
	STABLEQAT_TEST_GPU=1 $(BIN)/python -m pytest tests/ops tests/quantizers tests/test_linear.py

lint: $(STAMP)
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/mypy src

$(STAMP): pyproject.toml
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@
