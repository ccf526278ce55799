# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif

.PHONY: demo test audit clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed-demo  ## the whole job on simulated tumours, offline
	$(BIN)/segmamba demo -o demo $(if $(DATA),--data $(DATA))

test: $(VENV)/installed-dev  ## style, types, room walls, and every test
	$(BIN)/python -m pytest -n 2 --dist loadfile

audit: $(VENV)/installed-dev  ## known weaknesses of the pinned versions; asks the network
	$(BIN)/python -m venv $(VENV)/audit
	$(VENV)/audit/$(notdir $(BIN))/python -m pip install --quiet pip-audit
	$(VENV)/audit/$(notdir $(BIN))/python -m pip_audit -r constraints.txt --no-deps --disable-pip

$(VENV)/installed-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) demo
