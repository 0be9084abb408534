# Set-up included: each target makes the virtual environment it needs.
PYTHON ?= python3
VENV ?= .venv
JOB ?= jobs/quickstart.yaml
OUT ?= runs/$(notdir $(basename $(JOB)))
READY := $(VENV)/.ready

run: $(READY)            ## the main job on the embedded benchmark (JOB=..., OUT=...)
	$(VENV)/bin/ray-unlearn run $(JOB) --out $(OUT)

test: $(READY)           ## all tests, offline, no GPU
	$(VENV)/bin/python -m pytest --slow

lint: $(READY)           ## style and types
	$(VENV)/bin/ruff check ray_unlearn search_spaces tests benchmarks
	$(VENV)/bin/ruff format --check ray_unlearn search_spaces tests benchmarks
	$(VENV)/bin/mypy

# torch first and by itself: resolved together with the rest, pip may fetch another build of it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

.PHONY: run test lint
