PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Threads that wait should sleep: spinning ones cost up to forty times the time on a busy machine.
export OMP_WAIT_POLICY ?= passive
# PyTorch asks for pages of 2 MiB: touching small ones for the first time takes a tenth of a call.
export THP_MEM_ALLOC_ENABLE ?= 1

.PHONY: demo test check clean

demo: $(VENV)/demo.stamp
	$(BIN)/python -m examples.first_hour

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n auto

check: $(VENV)/dev.stamp
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check --no-tests

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/%.stamp: pyproject.toml constraints.txt | $(VENV)/created
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	@touch $@

$(VENV)/created:
	$(PYTHON) -m venv $(VENV)
	@touch $@
