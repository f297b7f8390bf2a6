# make install | quickstart | test | test-versions | soak | test-detectron2 | lint | docs | bench | gpu | verify-weights | wheel | clean
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two processes by default: the suite is written for two cores.
JOBS ?= 2

.PHONY: install dev quickstart test test-versions soak test-slow test-detectron2 lint format docs bench gpu verify-weights wheel clean

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

# The suite with the lowest torch and torchvision that setup.cfg admits and with the newest that pip finds, one after
# the other, each in an environment of its own beside $(VENV); a line for each at the end.
VERSIONS := lowest newest
RESULTS := $(VERSIONS:%=build/versions/%.txt)
REQUIRE_lowest = $(shell sed -n 's/^ *\(torch\|torchvision\)>=\([0-9.]*\)$$/\1==\2/p' setup.cfg)

test-versions:
	@mkdir -p build/versions && rm -f build/versions/*
	@status=0; $(MAKE) --keep-going --jobs=1 $(RESULTS) || status=1; \
	  for v in $(VERSIONS); do cat build/versions/$$v.txt 2>/dev/null || echo "$$v: not run"; done; exit $$status

# Each time with the newest of everything else: old environments of that name are brought up to date.
build/versions/%.txt:
	test -x $(VENV)-$*/bin/python || $(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore $(VENV)-$*/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
	  $(REQUIRE_$*) --editable '.[test]'
	{ $(VENV)-$*/bin/python -m pytest -n $(JOBS) --dist worksteal; echo $$? >build/versions/$*.status; } \
	  | tee build/versions/$*.log
	@$(VENV)-$*/bin/python -c 'import platform, sys, numpy, torch, torchvision; \
	  print(f"$*: python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__},", \
	  f"numpy {numpy.__version__}:", open(sys.argv[1]).read().split("\n")[-2].strip("= "))' build/versions/$*.log >$@
	@exit "$$(cat build/versions/$*.status)"

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

# The site is written to build/site; open index.html there. Search needs a server: python -m http.server -d build/site
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/.installed-docs: setup.cfg pyproject.toml | $(BIN)/python
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

# Needs a network: fetches every published weights file that gn_det names and loads it; compares AP where COCO is present.
verify-weights: install
	$(BIN)/python benchmarks/verify_weights.py

bench: install
	$(BIN)/python benchmarks/coco_eval.py
	$(BIN)/python benchmarks/engine.py

# On a machine with a GPU, without network: what benchmarks/GPU_TODO.md says. Uses $(VENV) if there is one.
gpu:
	PYTHONPATH=. $(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu.py $(GPU)

wheel: $(BIN)/python
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
