PYTHON ?= python3
RUN = $(PYTHON) -m

.PHONY: check lint test docs

check: lint test

lint:
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) mypy

test:
	$(RUN) pytest

docs:
	$(PYTHON) docs/reference.py
