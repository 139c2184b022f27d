# make run answers the thread's question; make test passes the tests. Everything else they need, they install into .venv.
PYTHON := $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup run test check docs bench verify mutants clean

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; install one (Debian: apt-get install python3 python3-venv)" >&2; exit 5; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@echo 'compiling the model, once'; $(BIN)/python -c 'from sweep.point import compile_kernels; compile_kernels()'
	@$(BIN)/python -m sweep.host.litmus || echo 'without it no kernel can be booted for faultsweep validate; all else works'
	@touch $(STAMP)

run: $(STAMP)
	$(BIN)/faultsweep run configs/studies/thread.toml --out results/thread
	$(BIN)/faultsweep report results/thread

test: $(STAMP)
	@sh tests/chromium.sh
	$(BIN)/python -m pytest -n 2

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP)
	$(BIN)/python -m sweep.pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(STAMP)
	$(BIN)/python -m tests.bench.run

verify: $(STAMP)
	FAULTSWEEP_EXAMPLES=200000 $(BIN)/python -m pytest -n 2 tests/test_differential.py
	FAULTSWEEP_KILLS=1000 $(BIN)/python -m pytest -n 2 tests/test_kills.py
	FAULTSWEEP_STUDIES=all $(BIN)/python -m pytest tests/test_studies_page.py
	$(BIN)/faultsweep validate -q --all --random 300 --seconds 1800 --boot 6.1 --boot 6.12 --boot 6.18 --boot 7.3 --mmu tdp --mmu legacy --mmu shadow

mutants: $(STAMP)
	$(BIN)/python -m tests.mutation.run

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
