# Everything a person or CI does here. Each target installs what it needs; nothing is installed outside .venv.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
BUNDLE ?= models/bundles/movielens-100k
PORT   ?= 8000
ADMIN_PORT ?= 8001
WORKERS ?= $(shell nproc)

.PHONY: help install demo serve test check format bench-quality bench-reliability bench-speed flame bench-scale monitoring-test lock image-test bench-capacity clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# One stamp file per set of dependencies, made again when pyproject.toml changes.
$(VENV)/serve.stamp: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Winnow needs Python 3.11 or later")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/train.stamp: $(VENV)/serve.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[train]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/train.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

install: $(VENV)/dev.stamp  ## make .venv with everything: serving, training, testing

$(VENV)/loadtest.stamp: $(VENV)/serve.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[loadtest,pack]'
	touch $@

demo: $(VENV)/train.stamp  ## fetch, train, pack, serve, and rank once; stays up until Ctrl-C
	$(BIN)/python -m models demo --port $(PORT) --admin-port $(ADMIN_PORT) --workers $(WORKERS)

serve: $(VENV)/serve.stamp  ## serve a bundle: BUNDLE=… PORT=… ADMIN_PORT=… WORKERS=…
	exec env WINNOW_BUNDLE=$(BUNDLE) WINNOW_PORT=$(PORT) WINNOW_ADMIN_PORT=$(ADMIN_PORT) WINNOW_WORKERS=$(WORKERS) \
	  $(BIN)/python -m app serve

check: $(VENV)/dev.stamp  ## format, lint, types, architecture
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy app
	$(BIN)/pytest tests/test_architecture.py

test: $(VENV)/dev.stamp  ## every test
	$(BIN)/pytest

format: $(VENV)/dev.stamp  ## format the tree and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-quality: $(VENV)/train.stamp  ## fit, measure and print the quality table; exits non-zero under a bar
	$(BIN)/python -m models.bench_quality

models/bundles/w1/manifest.json: | $(VENV)/train.stamp
	$(BIN)/python -m models synthesize --seed 0 --out models/bundles/w1 --name w1 --force

models/bundles/w1b/manifest.json: | $(VENV)/train.stamp
	$(BIN)/python -m models synthesize --seed 1 --out models/bundles/w1b --name w1b --force

bench-reliability: $(VENV)/loadtest.stamp models/bundles/w1/manifest.json models/bundles/w1b/manifest.json  ## faults and overload on a million items: over an hour
	$(BIN)/python -m loadtest faults

models/bundles/w1-int8/manifest.json: models/bundles/w1-cut/manifest.json | $(VENV)/loadtest.stamp
	$(BIN)/python -m models quantise models/bundles/w1-cut --requests models/bundles/w1.requests.jsonl \
	  --out models/bundles/w1-int8 --force

models/bundles/w1-cut/manifest.json: models/bundles/w1/manifest.json | $(VENV)/loadtest.stamp
	$(BIN)/python -m models hoist models/bundles/w1 --out models/bundles/w1-cut --force

bench-speed: $(VENV)/loadtest.stamp models/bundles/w1/manifest.json  ## the service over its raw kernels on a million items: about 45 minutes
	-$(MAKE) models/bundles/w1-int8/manifest.json  # where it pays; else its bars are missed
	$(BIN)/python -m loadtest.bench_speed

$(VENV)/profile.stamp: $(VENV)/loadtest.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[profile]'
	touch $@

flame: $(VENV)/profile.stamp models/bundles/w1/manifest.json  ## where the service spends its time under load: docs/flame.svg
	$(BIN)/python -m loadtest flame docs/flame.svg

bench-scale: $(VENV)/train.stamp $(VENV)/loadtest.stamp models/bundles/w1/manifest.json  ## ten million items, made first: half an hour
	$(BIN)/python -m loadtest.bench_scale

# Debian's package, unpacked and not installed: no root, no service that starts, nothing outside .venv.
PROMETHEUS := $(VENV)/prometheus

$(PROMETHEUS)/usr/bin/promtool:
	mkdir -p $(PROMETHEUS)
	cd $(PROMETHEUS) && { apt-get download -qq prometheus || { apt-get update -qq && apt-get download -qq prometheus; }; }
	dpkg -x $(PROMETHEUS)/prometheus_*.deb $(PROMETHEUS)
	rm $(PROMETHEUS)/prometheus_*.deb
	touch $@

monitoring-test: $(VENV)/dev.stamp $(PROMETHEUS)/usr/bin/promtool  ## alerts and dashboards, on a real Prometheus
	PATH="$(abspath $(PROMETHEUS))/usr/bin:$$PATH" $(BIN)/python -m tests.monitoring

# The newest that pyproject.toml allows, with the hashes of all their files. The second resolution only shows that the
# same versions have wheels for ARM too.
$(VENV)/lock.stamp: $(VENV)/serve.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[lock]'
	touch $@

LOCK := $(BIN)/uv pip compile --quiet --upgrade --python-version 3.11 --only-binary :all: --custom-compile-command 'make lock'

lock: $(VENV)/lock.stamp  ## pin what the image installs, with hashes: requirements.lock
	$(LOCK) --generate-hashes --python-platform x86_64-manylinux_2_28 pyproject.toml --output-file requirements.lock
	$(LOCK) --python-platform aarch64-manylinux_2_28 --constraints requirements.lock pyproject.toml >/dev/null
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])' \
	  | $(LOCK) --generate-hashes --no-annotate --output-file requirements-build.lock -

image-test: $(VENV)/dev.stamp  ## build the image and run it hardened: Debian and root, for podman and buildah; minutes
	$(BIN)/pytest -vv -rP tests/deploy/test_dockerfile.py tests/deploy/test_compose.py tests/image/hardened.py

bench-capacity: $(VENV)/loadtest.stamp models/bundles/w1/manifest.json  ## the planner's predictions against measurements: over an hour
	$(BIN)/python -m loadtest capacity

clean:  ## remove what was made: the venv, data, bundles, caches
	rm -rf $(VENV) data models/bundles models/artefacts reports build winnow.egg-info .pytest_cache .mypy_cache .ruff_cache
