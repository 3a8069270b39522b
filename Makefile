# Each target makes its own .venv when it is missing, and installs what it needs.
.PHONY: setup check test hostile bench demo clean

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

setup: .venv/.dev

.venv/.base: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "agentkit needs Python 3.11 or newer with venv, and found none. On Debian: apt-get install python3-venv"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "installing agentkit into .venv ..."
	@$(PIP) --upgrade 'pip>=25.1'
	@$(PIP) --editable .
	@touch $@

.venv/.test: .venv/.base
	@echo "installing the test tools ..."
	@$(PIP) --group test
	@touch $@

.venv/.dev: .venv/.test
	@$(PIP) --group dev
	@touch $@

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: .venv/.test
	$(BIN)/python -m pytest $(ARGS)

# pytest exits with 5 where no test is selected, for one with ARGS.
hostile: .venv/.test
	$(BIN)/python -m pytest -m hostile $(ARGS) || test $$? -eq 5

bench: .venv/.test
	@failed=0; for room in agentkit_engine agentkit; do \
		$(BIN)/python -m $$room.benchmarks $(if $(ONLY),--only $(ONLY)) || failed=1; \
	done; exit $$failed

demo: .venv/.base
	@$(BIN)/agentkit demo $(ARGS)

clean:
	rm -rf .venv build dist runs
