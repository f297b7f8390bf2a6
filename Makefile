# make install | quickstart | test | soak | test-detectron2 | lint | bench | wheel | clean
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two processes by default: the suite is written for two cores.
JOBS ?= 2

.PHONY: install dev quickstart test soak test-slow test-detectron2 lint format bench wheel clean

install: $(VENV)/.installed

dev: $(VENV)/.installed-dev

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "gn_det needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: setup.cfg pyproject.toml | $(BIN)/python
	@# setuptools warns at every editable install of a package beside its tests; that is noise to a user.
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

$(VENV)/.installed-dev: setup.cfg pyproject.toml | $(BIN)/python
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.installed

quickstart: install
	$(BIN)/gn-det quickstart

test: install
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test-slow: install
	$(BIN)/python -m pytest -m 'slow and not gpu and not detectron2'

# About 25 minutes on two idle cores; PART="kills json" runs some parts, SIZE=0.1 a tenth of the counts. The table of all
# parts that ran stands in output/soak/summary.txt.
PART ?=
SIZE ?= 1
soak: install
	$(BIN)/python tests/faults/soak.py --size $(SIZE) $(PART)

# Needs Detectron2 in $(VENV): https://detectron2.readthedocs.io/en/latest/tutorials/install.html
test-detectron2: install
	@$(BIN)/python -c 'import detectron2' || { echo "Detectron2 is not installed in $(VENV); see its installation page:"; \
	  echo "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"; exit 1; }
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m 'detectron2 and not gpu'

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python benchmarks/coco_eval.py
	$(BIN)/python benchmarks/engine.py

wheel: $(BIN)/python
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
