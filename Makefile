# Two commands are all that a newcomer needs: make demo, make test.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := python -m pip install --quiet --disable-pip-version-check
DEMO := $(VENV)/.demo
INSTALLED := $(VENV)/.installed
WHEEL ?= .venv-wheel
WORKERS ?= 2
PEERS ?= .venv-peers
REDACTION_PEERS ?= .venv-redaction-peers

# Tests run side by side; more threads in each would only fight over the cores.
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test wheel-check mutations lint types format services peers redaction-peers bench-data bench-dp bench-device bench-redaction bench-anonymize bench-results clean

help:
	@echo "make demo   the main job, end to end (examples/quickstart.py)"
	@echo "make test   the whole test suite, with its coverage; installs what it needs, or says what is missing"
	@echo "make wheel-check   the wheel, in an environment with nothing but its dependencies"
	@echo "make mutations   known weaknesses, put back one by one: each must turn a test red"
	@echo "make services   what some tests need beyond Python's packages (softhsm2, postgresql, by apt-get)"
	@echo "make lint   ruff, import-linter and the word list;  make types   mypy;  make format   ruff format"
	@echo "make peers redaction-peers   the libraries that benchmarks compare with, in environments of their own"
	@echo "make bench-data ARGS=...   how fast shards are read, beside them (ARGS=--quick: under a minute)"
	@echo "make bench-redaction ARGS=...   what the detectors find, and how fast, beside theirs (ARGS=--quick: under a minute)"
	@echo "make bench-anonymize ARGS=...   what anonymisation adds to a sealing (ARGS=--quick: under a minute)"
	@echo "make bench-device ARGS=... what a private step would cost on a GPU, counted on this machine (ARGS=--quick: under a minute)"
	@echo "make bench-dp ARGS=...     what private training costs, beside Opacus (ARGS=--quick: under a minute; ARGS='--device cuda')"

# The demo needs one extra; dev holds that as well, and adds the rest.
$(DEMO): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP) -c constraints.txt -e ".[examples]"
	@touch $@

$(INSTALLED): $(DEMO)
	$(BIN)/$(PIP) -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(DEMO)
	$(BIN)/python examples/quickstart.py

# Without its services a test is skipped and named, but not where LIGHTNING_SECURE_REQUIRE_SERVICES is set.
test: $(INSTALLED)
	@$(PYTHON) tests/services/services.py || test -z "$$LIGHTNING_SECURE_REQUIRE_SERVICES"
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --cov --cov-report=term --cov-fail-under=95 \
		--ignore=tests/mutations
	$(BIN)/python tests/services/gate.py

wheel-check:
	$(PYTHON) -m venv --clear $(WHEEL)
	$(WHEEL)/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps -w $(WHEEL) .
	$(WHEEL)/bin/$(PIP) --no-compile -c constraints.txt $(WHEEL)/*.whl
	$(WHEEL)/bin/python -I .ci/wheel_check.py

# A test of the tests, and so not among them.
mutations: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/mutations

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python .ci/words.py

types: $(INSTALLED)
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Without dependencies: the file names all of them, and leaves out a torchvision that breaks torch.
$(PEERS)/.installed: benchmarks/peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/$(PIP) --no-deps -r benchmarks/peers.txt
	@touch $@

peers: $(PEERS)/.installed

$(REDACTION_PEERS)/.installed: benchmarks/redaction-peers.txt
	$(PYTHON) -m venv $(REDACTION_PEERS)
	$(REDACTION_PEERS)/bin/$(PIP) --no-deps -r benchmarks/redaction-peers.txt
	@touch $@

redaction-peers: $(REDACTION_PEERS)/.installed

# The other services that tests start (OpenBao, moto) come with the dev extra.
services:
	@$(PYTHON) tests/services/services.py

bench-data: $(INSTALLED) $(PEERS)/.installed
	env -u OMP_NUM_THREADS $(BIN)/python benchmarks/shards.py --peers $(PEERS) $(ARGS)

bench-dp: $(INSTALLED)
	env -u OMP_NUM_THREADS $(BIN)/python benchmarks/dp.py $(ARGS)

bench-device: $(INSTALLED)
	$(BIN)/python benchmarks/device_cost.py $(ARGS)

bench-redaction: $(INSTALLED) $(REDACTION_PEERS)/.installed
	$(BIN)/python benchmarks/redaction.py --peers $(REDACTION_PEERS) $(ARGS)

bench-anonymize: $(INSTALLED)
	$(BIN)/python benchmarks/anonymize.py $(ARGS)

# Speeds and costs in benchmarks/results/, and their pictures; it takes long, on a quiet machine.
bench-results:
	$(MAKE) bench-data ARGS="--json benchmarks/results/shards.json"
	$(BIN)/python benchmarks/picture.py benchmarks/results/shards.json docs/img/shards.svg
	$(MAKE) bench-dp ARGS="--json benchmarks/results/dp.json"
	$(MAKE) bench-device ARGS="--json benchmarks/results/device_cost.json"
	$(BIN)/python benchmarks/dp_utility.py --json benchmarks/results/dp_utility.json
	$(BIN)/python benchmarks/dp_picture.py benchmarks/results/dp.json benchmarks/results/dp_utility.json docs/img/dp.svg
	$(MAKE) bench-redaction ARGS="--json benchmarks/results/redaction.json"
	$(MAKE) bench-anonymize ARGS="--json benchmarks/results/anonymize.json"

clean:
	rm -rf $(VENV) $(WHEEL) $(PEERS) $(REDACTION_PEERS) .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis quickstart-run
