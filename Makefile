.PHONY: demo test test-all fuzz venv lint clean
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 2

demo: venv ## the main job on the lab's checkpoints: repair; then by hand, a sweep, a picture, the page
	$(BIN)/python -m benchmarks.demo

test: venv lint ## everything that CI runs, a process and a thread per core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --dist worksteal

test-all: venv lint ## the same, what reads slots on every family and not on the representatives only
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --dist worksteal --all-families

fuzz: venv ## 100 000 damaged inputs (hours; goes on where it was stopped), and the page of what came of them
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.reliability --inputs 100000

lint: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

venv: .venv/installed ## only install

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q "$$(grep ^torch== constraints.txt)"
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv demo-output .mypy_cache .ruff_cache .pytest_cache
