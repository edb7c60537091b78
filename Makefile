# Two commands matter: `make demo` and `make test`. Each builds what it needs first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: install demo test lint bench bench-gpu mutants docs audit clean

# The environment, rebuilt when the project's dependencies change. The CUDA build of torch is large: minutes, once.
$(VENV)/demo: pyproject.toml constraints.txt
	@echo "installing into $(VENV): some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/test: $(VENV)/demo
	@echo "installing what tests need into $(VENV): some minutes"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

# The command alone: .venv/bin/consilium.
install: $(VENV)/demo

# Three invented hospitals train a model together; ends with a table and the path of a report.
demo: $(VENV)/demo
	$(BIN)/consilium cohort make demo/cohort --sites 3 --patients 240 --seed 0
	$(BIN)/consilium simulate simulations/jobs/chest.toml --data demo/cohort --baselines --out demo/run

# All but the tests that are marked slow; CI has these too, and counts the lines that ran: see .ci/run.
test: $(VENV)/test
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "not slow" $(ARGS)

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/test
	$(BIN)/python -m benchmarks.engine --peers --scale --write

# Training on a GPU against loops written by hand; without a GPU in small, which says so.
bench-gpu: $(VENV)/test
	$(BIN)/python -m benchmarks.gpu

# Changes one thing at a time in the code that must not be wrong, and says which changes no test notices; an hour or more.
# ARGS="server.robust*" for a part; afterwards `.venv/bin/mutmut results`, `.venv/bin/mutmut show NAME`.
mutants: $(VENV)/test
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[mutants]'
	$(BIN)/mutmut run --max-children 2 $(ARGS)

# The documentation as a site that opens without a network: site/index.html.
docs: $(VENV)/test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo site/index.html

# Asks the public database of advisories about the tested set, and writes what is installed as a CycloneDX bill of materials.
audit: $(VENV)/test
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[release]'
	$(BIN)/cyclonedx-py environment --output-file sbom.json $(VENV)
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip

clean:
	rm -rf $(VENV) demo site mutants sbom.json
