# Each target creates .venv if it is missing and installs its dependencies.
.PHONY: setup check test hostile kernels kernels-table gpu bench demo clean

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

setup: .venv/.dev

.venv/.base: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found; install one with venv. On Debian: apt-get install python3-venv"; exit 1; }
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

# Two processes; each runs whole files, whose tests share fixtures. Without make, pytest runs in one.
test: .venv/.test
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

# pytest exits with 5 if ARGS selects no test.
hostile: .venv/.test
	$(BIN)/python -m pytest -m hostile $(ARGS) || test $$? -eq 5

# Triton reads TRITON_INTERPRET when it is imported, so its interpreter needs a process of its own.
# It multiplies tiles with NumPy, whose OpenBLAS has kernels for Haswell in which the bits of a row depend on the others.
INTERPRETED := TRITON_INTERPRET=1 OPENBLAS_CORETYPE=Sandybridge $(BIN)/python -m pytest tests/kernels/triton

kernels: .venv/.test
	$(BIN)/python -m agentkit_kernels.aot --check
	$(INTERPRETED) --numprocesses 2 --dist loadfile $(ARGS)
	$(BIN)/python -m agentkit_kernels.aot --targets sm_90 gfx942 --shapes flash --no-count
	$(MAKE) gpu ARGS=--rehearse

kernels-table: .venv/.test
	$(INTERPRETED) --errors .venv/kernel-errors.json
	$(BIN)/python -m agentkit_kernels.aot --write --errors .venv/kernel-errors.json

# Installs nothing: a GPU is often borrowed, without a network. Any Python with torch and triton will do.
gpu:
	PYTHONPATH=kernels:engine $(or $(wildcard $(BIN)/python),$(PYTHON)) -m agentkit_engine.benchmarks.gpu $(ARGS)

bench: .venv/.test
	@failed=0; for room in agentkit_engine agentkit; do \
		$(BIN)/python -m $$room.benchmarks $(if $(ONLY),--only $(ONLY)) || failed=1; \
	done; exit $$failed

demo: .venv/.base
	@$(BIN)/agentkit demo $(ARGS)

clean:
	rm -rf .venv build dist runs
