# make quickstart   install, then train ConvMLP-S on real handwritten digits (two or three minutes on two cores)
# make test         install, then run the whole test suite
# Each target sets up .venv by itself, once. PYTHON=python3.12 make ... takes another interpreter.

PYTHON ?= python3
VENV = .venv
INSTALLED = $(VENV)/.installed

.PHONY: install quickstart test lint format clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13) and "Python 3.10 to 3.13 is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	@echo "Installing into $(VENV): PyTorch with its CUDA libraries, about 6 GB. Once."
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --upgrade pip
	@$(VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	@touch $@

quickstart: $(INSTALLED)
	PYTHON=$(VENV)/bin/python ./dist_classification.sh 1 -c configs/classification/quickstart.yml --overwrite $(ARGS)

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest $(ARGS)

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(INSTALLED)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build dist output src/*.egg-info
