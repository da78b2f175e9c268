# make serve: the bundled model on 127.0.0.1:8000 (PORT=..., ARGS="--flags").  make test: everything that is checked.
# make test-deploy: the image, Prometheus and the other files of deploy/, for real; as root on Debian or Ubuntu.

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: serve test test-deploy lint format clean

serve: $(VENV)/.serve
	exec $(VENV)/bin/steadystate serve --host $(HOST) --port $(PORT) $(ARGS)

# two files at a time, a thread each: as many as the smallest machine has cores
test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

# Without Docker: buildah follows the Dockerfile on a Debian that debootstrap makes, under build/.
# Debian's packages start prometheus and nginx as services; the tests use other ports and need neither.
test-deploy: $(VENV)/.deploy
	@missing=$$(for tool in prometheus promtool debootstrap buildah nginx; do \
		PATH=$$PATH:/usr/sbin command -v $$tool >/dev/null || echo $$tool; done); \
	[ -z "$$missing" ] || { apt-get update --quiet && DEBIAN_FRONTEND=noninteractive apt-get install \
		--yes --quiet --no-install-recommends prometheus debootstrap buildah nginx-light; }
	$(VENV)/bin/python -m tests.deploy.image
	TEST_IMAGE=1 $(VENV)/bin/python -m pytest -rs tests/deploy

# of what is installed only what is imported is compiled, once for all the processes that tests start
test lint: export PYTHONDONTWRITEBYTECODE =

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy --num-workers 2
	$(VENV)/bin/python -m benchmarks.table --check
	$(VENV)/bin/python -m deploy.dashboard --check
	$(VENV)/bin/python -m deploy.prometheusrule --check

format: $(VENV)/.test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable .
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --no-compile --editable '.[dev]'
	@touch $@ $(VENV)/.serve

$(VENV)/.deploy: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[dev,deploy]'
	@touch $@ $(VENV)/.test $(VENV)/.serve

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
