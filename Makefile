# Two commands, on a machine with Python 3.11 or newer and nothing else:
#   make study   sets up .venv, runs the study, says where its report is
#   make test    sets up .venv, runs every test on all cores (12 minutes on two)
# Both set up once; they do it again when pyproject.toml or constraints.txt changes.

PYTHON ?= python3
VENV   ?= .venv
BIN    ?= $(VENV)/bin
PRESET ?= micro
README ?= README.md
READY  := $(VENV)/.ready

.PHONY: help study test test-fast setup lab export readme constraints

help:
	@sed -n 's/^#   //p' Makefile
	@echo "also: make test-fast (two minutes: all but notebooks, kernels and trainings); make test ARGS='-k NAME';"
	@echo "make lab, export, readme, constraints; make study PRESET=smoke; PYTHON=python3.12"

study: setup
	@$(BIN)/selfalign run $(PRESET)

test: setup
	@$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

# For those who edit: what takes no notebook, no kernel and no training, in two minutes.
test-fast: setup
	@$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not big" $(ARGS)

lab: setup
	@$(BIN)/selfalign lab

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "selfalign needs Python 3.11 or newer, with venv (on Debian: apt install python3-venv)."; \
	  echo "Name another one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): once, a few minutes (PyTorch is large)."
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test,captions]'
	@touch $@

# For those who change the study

export:
	@$(BIN)/ruff format -q nbs tests
	@$(BIN)/nbdev-clean
	@$(BIN)/nbdev-export
	@$(MAKE) --no-print-directory readme

# README.md is nbs/index.ipynb; links start at the repository's root instead of nbs/.
readme:
	@$(BIN)/python -m nbconvert --log-level WARN --to markdown --stdout nbs/index.ipynb \
	  | sed -E 's#\]\(([0-9]_)#](nbs/\1#g; s#\]\(\.\./#](#g' > $(README)

constraints:
	@sed -n '/^#/p' constraints.txt > $(VENV)/constraints
	@$(BIN)/python -m pip freeze --all --exclude selfalign --exclude pip | grep -v '^-e' | LC_ALL=C sort -f >> $(VENV)/constraints
	@mv $(VENV)/constraints constraints.txt
