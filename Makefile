# make demo   everything from an empty checkout to the demo's table and pictures
# make test   the tests             make lint   style
PYTHON ?= python3
BIN := .venv/bin

demo: .venv/installed
	$(BIN)/python demo.py

test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@

.PHONY: demo test lint
