# make quickstart   sets up .venv, then trains, exports and measures a small first stage (about 4 minutes)
# make test         sets up what the tests need, then runs them
# make check        lint, format, types and the import contract

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# one message instead of a resolver's for a Python that constraints.txt was not made for; any Python can read it
define KNOWN_PYTHON
import re, sys
known = re.findall(r'Python :: (3\.\d+)', open('pyproject.toml').read())
if '%d.%d' % sys.version_info[:2] not in known:
    sys.exit('Python %s to %s is needed; $(PYTHON) is %s. Set PYTHON=python%s, for example.' % (
        known[0], known[-1], sys.version.split()[0], known[-2]))
endef
export KNOWN_PYTHON

.PHONY: quickstart test check format clean

quickstart: $(VENV)/.installed
	$(BIN)/latent-ae train quickstart

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info

$(BIN)/python:
	@$(PYTHON) -c "$$KNOWN_PYTHON"
	$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }

# a stamp is newer than what it was made from: setting up again happens only when that changes
$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
