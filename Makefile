# `make demo` and `make test` set everything up by themselves in .venv; neither needs root, a GPU or the network at run time.
PYTHON ?= python3
BIN := .venv/bin

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: demo test check lint docs gallery clean

demo: .venv/installed
	rm -rf runs/demo
	$(BIN)/python -m ssl_geometry.fit --config configs/quickstart/supervised.yaml --experiment demo --run_id supervised
	$(BIN)/python -m ssl_geometry.fit --config configs/quickstart/simclr.yaml --experiment demo --run_id simclr \
		--cka.reference runs/demo/supervised
	$(BIN)/python -m ssl_geometry.report runs/demo/simclr runs/demo/supervised -o runs/demo/report.html
	@echo "CKA map SimCLR x supervised:  runs/demo/simclr/figures/cka_map_supervised.png"
	@echo "CKA curves over the epochs:   runs/demo/simclr/figures/cka_epochs_init.png"

test: lint
	$(PYTEST)

check: lint  # for frequent use while writing: unit tests without simulations, compiling or a new interpreter
	$(PYTEST) tests/unit -m "not slow"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "The site is in site/; $(BIN)/python -m mkdocs serve shows it while you write."

gallery: demo
	$(BIN)/python docs/gallery.py

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
