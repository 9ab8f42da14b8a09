# The commands of the book. `make` alone lists them.
# PYTHON picks the interpreter for .venv; TORCH_INDEX_URL adds a package index with CPU builds of torch.

PYTHON ?= python3
BIN := .venv/bin
NOTEBOOKS := $(wildcard book/*.ipynb)
export JUPYTER_PREFER_ENV_PATH := 1
export PYDEVD_DISABLE_FILE_VALIDATION := 1

# Small tensors: more threads cost more than they give, above all beside a second worker.
book test notebooks faults: export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help install book test lab serve notebooks lint format bench faults mutants verdicts linkcheck lock clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: .venv/.installed ## make .venv with the locked packages and kfac_lib

.venv/.installed: requirements.lock requirements-peers.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Python 3.11 or newer is needed; '$(PYTHON)' is not. Install it, or say which: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
	  { echo "Cannot make .venv: the venv module of Python is missing. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Installing the locked packages into .venv ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 2 -r requirements.lock $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) >.venv/install.log 2>&1 || \
	  { echo "Installing failed: is the package registry reachable? Check the network and pip's index settings, then run make again (log: .venv/install.log)"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 2 --no-deps -r requirements-peers.lock >>.venv/install.log 2>&1 || \
	  { echo "Installing the other KFAC libraries failed (log: .venv/install.log)"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e . >>.venv/install.log 2>&1 || \
	  { echo "Installing kfac_lib itself failed (log: .venv/install.log)"; exit 1; }
	@touch $@

book: install ## build the site: _build/html/index.html
	@$(BIN)/python scripts/build_book.py

test: book ## library, notebooks and site in a real browser
	@$(BIN)/python -m pytest -n 2 --dist loadscope --nbval --nbval-cell-timeout 120 --doctest-modules tests kfac_lib $(NOTEBOOKS)

lab: install ## JupyterLab on the chapters
	@cd book && ../$(BIN)/jupyter lab

serve: book ## the site on http://localhost:8000
	@$(BIN)/python -m http.server --directory _build/html --bind 127.0.0.1 8000

notebooks: install ## execute the notebooks anew and store their outputs
	@$(BIN)/python scripts/run_notebooks.py $(NOTEBOOKS)

lint: install ## ruff for code and notebooks, mypy --strict for kfac_lib
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --strict kfac_lib

format: install ## let ruff mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: install ## speed, side by side with peers
	@$(BIN)/python -m benchmarks

faults: book ## put faults in on purpose; each must turn the tests red
	@$(BIN)/python -m tests.faults

verdicts: install ## book/wrong_kfacs.csv anew: what the kit says of wrong KFACs
	@OMP_NUM_THREADS=1 $(BIN)/python tests/lib/judge.py

mutants: install ## change the library in every small place; the share that the tests notice
	@$(BIN)/python scripts/mutation.py

linkcheck: install ## are the links to other sites alive (needs the network)
	@$(BIN)/jupyter-book build book --config _config.yml --toc $(CURDIR)/_toc.yml --path-output _build/linkcheck --builder linkcheck

lock: ## requirements.lock anew from requirements.txt (needs the registry)
	@$(PYTHON) scripts/make_lock.py

clean: ## remove everything built, not .venv
	@rm -rf _build dist .web_assets
