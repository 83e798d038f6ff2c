# Everything a newcomer needs: `make demo`, `make test`. Works on a bare machine with Python >= 3.11 and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two processes of two threads each would fight over two cores; the programs that want more threads ask for them.
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE ?= 1

# The versions of transformers that are tested. Constraints that a version of it decides itself are left to it.
TRANSFORMERS ?= 5.16.1 5.19.0 newest
DECIDED_BY_TRANSFORMERS := transformers|huggingface_hub|tokenizers|safetensors

.PHONY: install demo test lint types unit families-table test-matrix clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: install
	$(BIN)/laco demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

unit: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test: lint types unit

# docs/families.md, which a test compares with the tests.
families-table: install
	PYTHONPATH=tests $(BIN)/python -m families.table

# The part of the tests that meets transformers, on every version, each in an environment of its own.
test-matrix: $(TRANSFORMERS:%=test-transformers-%)

test-transformers-%: .venvs/%/.installed
	OMP_NUM_THREADS=1 .venvs/$*/bin/python -m pytest -n 2 -p no:cacheprovider \
		tests/families tests/methods tests/test_surgery.py tests/test_checkpoint.py tests/test_package.py

.PRECIOUS: .venvs/%/.installed
.venvs/%/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	grep -vE '^($(DECIDED_BY_TRANSFORMERS))==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c $(@D)/constraints.txt torch
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c $(@D)/constraints.txt -e ".[dev]" \
		$(if $(filter newest,$*),--upgrade transformers,transformers==$*)
	touch $@

clean:
	rm -rf $(VENV) .venvs build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
