# make lab    set up and open the first lesson in JupyterLab
# make app    nano on a page in your browser, for this machine only
# make test   set up, run every test and execute every notebook from the installed wheel
# make test-shapes   every lesson on small random models with the structure of SD3 Medium and 3.5 Medium
# make test-gpu   on a GPU: every notebook with nano, then with the model that is set (SD3KIT_MODEL; where none is, SD3
#                 Medium at true size with random weights); build/lessons/table.md says what each took
# make notebooks   execute the lessons and store their outputs
# make lint   what pre-commit checks
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
# With an NVIDIA GPU PyPI's torch is right; without one torch-cpu.txt names the small build.
TORCH := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo torch || echo -r torch-cpu.txt)
# A test process for each core and one more, since some wait for a browser or a server; each with one thread: several
# threads in each would wait for one another.
PROCESSES := $(shell $(PYTHON) -c "import os; print(min(8, (os.cpu_count() or 1) + 1))")
SPREAD := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(PROCESSES) --dist loadgroup

# Threads that wait must not spin, see sd3kit/__init__.py; what is set already stays.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: lab app test test-shapes test-gpu notebooks lint clean

# Learners work in copies without outputs, so that they guess before they see; a copy that is there is never replaced.
LESSONS := $(notdir $(wildcard notebooks/[0-9]*.ipynb))
MISSING = $(filter-out $(notdir $(wildcard notebooks/mine/*.ipynb)),$(LESSONS))

lab: $(VENV)/lab
	$(PIP) install -q --no-deps -e .
	$(if $(MISSING),$(BIN)/jupyter nbconvert --log-level WARN --to notebook --ClearOutputPreprocessor.enabled=True \
	    --output-dir notebooks/mine $(addprefix notebooks/,$(MISSING)))
	$(BIN)/jupyter lab notebooks/mine/00_start_here.ipynb

# The page's two libraries come from npm; a real model needs a server and the explorers.
app: $(VENV)/app
	$(PIP) install -q --no-deps -e .
	@if [ -n "$$SD3KIT_MODEL" ]; then $(BIN)/voila site/explorers.ipynb; \
	elif command -v npm >/dev/null; then $(BIN)/python site/serve.py; \
	else echo "There is no npm (Node.js), so this is the explorer and not the page."; $(BIN)/voila site/explorers.ipynb; fi

test: $(VENV)/ready
	$(PIP) install -q --no-deps --force-reinstall .
	$(SPREAD) $(PYTEST)

test-shapes: $(VENV)/ready
	$(PIP) install -q --no-deps --force-reinstall .
	SD3KIT_TEST_SHAPES=1 $(SPREAD) tests/test_shapes.py $(PYTEST)

test-gpu: $(VENV)/ready
	$(PIP) install -q --no-deps --force-reinstall .
	$(BIN)/python tests/lessons.py --survey build/lessons $(NUMBERS)

notebooks: $(VENV)/ready
	$(PIP) install -q --no-deps --force-reinstall .
	$(BIN)/python tests/lessons.py

lint: $(VENV)/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# What a learner needs; the tests need more, and bring it in one go.
$(VENV)/torch: pyproject.toml constraints.txt torch-cpu.txt
	$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and 'sd3kit needs Python 3.11 to 3.13; set PYTHON=')"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q --retries 1 --no-deps -c constraints.txt $(TORCH)
	touch $@

$(VENV)/lab: $(VENV)/torch
	$(PIP) install -q -c constraints.txt -e .[lab]
	touch $@

$(VENV)/app: $(VENV)/lab
	$(PIP) install -q -c constraints.txt -e .[site]
	touch $@

$(VENV)/ready: $(VENV)/torch
	$(PIP) install -q -c constraints.txt -e .[dev]
	touch $@

clean:
	rm -rf $(VENV) build dist
