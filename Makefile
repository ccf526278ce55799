# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif

ASK := --quiet --disable-pip-version-check --retries 0 --timeout 5

.PHONY: demo test audit clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed-demo  ## the whole job on simulated tumours, offline
	$(BIN)/segmamba demo -o demo $(if $(DATA),--data $(DATA))

test: $(VENV)/installed-dev  ## style, types, room walls, every test, and an audit
	$(BIN)/python -m pytest -n 2 --dist loadfile
	-$(MAKE) --no-print-directory audit  # a report: advisories of tomorrow break no test

audit: $(VENV)/installed-dev  ## known weaknesses of the pinned versions; asks the network
	$(BIN)/python -m venv $(VENV)/audit
	$(VENV)/audit/$(notdir $(BIN))/python -m pip install $(ASK) pip-audit
	$(VENV)/audit/$(notdir $(BIN))/python -m pip_audit -r constraints.txt --no-deps \
		--disable-pip --timeout 5 --progress-spinner off

$(VENV)/installed-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) demo
