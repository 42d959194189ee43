# Two commands matter: `make book` and `make test`. Both start from nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PYTHONUTF8 := 1

.PHONY: book test serve clean lock bib site stale export

book: $(STAMP) export stale site
	@echo "The book is at file://$(CURDIR)/_build/html/index.html"

test: $(STAMP) export
	CI_CHROMIUM="$$($(SHELL) tests/chromium.sh)" $(BIN)/python -m pytest \
	  --numprocesses auto --dist loadfile $(ARGS)

$(STAMP): settings.ini setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable ".[book,dev]"
	@touch $@

# The modules are generated from the notebooks and committed with them.
export: $(STAMP)
	@$(BIN)/nbdev_export

# Runs the chapters whose stored outputs are out of date: none, as committed.
stale: $(STAMP)
	@$(BIN)/reappraisal run --scale book --write --stale

site: $(STAMP)
	@$(BIN)/jupyter-book build nbs --quiet --path-output . \
	  --config $(CURDIR)/_config.yml --toc $(CURDIR)/_toc.yml

serve: book
	$(BIN)/python -m http.server --directory _build/html 8000

bib: $(STAMP)
	@$(BIN)/python -c "from pathlib import Path; \
	from reappraisal.protocol.papers import load_papers, to_bibtex; \
	Path('references.bib').write_text(to_bibtex(load_papers()))"

# Resolve everything anew, in an environment of its own.
lock:
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet ".[book,dev]"
	{ echo "# The full lock; \`make lock\` renews it."; \
	  build/lock/bin/python -m pip freeze --all --exclude reappraisal --exclude pip \
	  | sed -E 's/^([A-Za-z0-9_.-]+) @ .*/\1/; s/\+cpu$$//'; } > build/lock.txt
	mv build/lock.txt constraints.txt && rm -rf build/lock

clean:
	rm -rf _build build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
