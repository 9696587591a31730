# Two commands: `make deploy` shows the whole thing on disposable hosts, `make test` proves it.
# Everything runs from .venv, which they make themselves.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
INVENTORY ?= inventory.py

# TORCH_INDEX=URL: where the wanted build of torch is; pytorch.org shows the addresses.
ifdef TORCH_INDEX
export PIP_EXTRA_INDEX_URL := $(PIP_EXTRA_INDEX_URL) $(TORCH_INDEX)
endif

# Hundreds of processes are started from here: none has to compile its modules anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup deploy drift down model wheelhouse test test-unit bench bench-deploy fuzz bench-peers lint docs lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## the virtual environment, from requirements/dev.txt

# Written last, so that a cut installation is made anew.
$(READY): requirements/dev.txt requirements/data.txt requirements/tls.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; this is $$($(PYTHON) --version). Try: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || $(MAKE) --no-print-directory ensurepip
	@echo "==> setting up $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements/dev.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements/data.txt --requirement requirements/tls.txt
	@touch $@

# Debian's Python comes without it.
.PHONY: ensurepip
ensurepip:
	@test "$$(id -u)" = 0 || { echo "python3-venv is missing; as root: apt-get install python3-venv"; exit 1; }
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y python3-venv

# First of all, with nothing installed: can this machine host the lab? Says what works if not.
.PHONY: can-host
can-host:
	@$(PYTHON) -m lab check

deploy: can-host $(READY) ## lab hosts, a trained model, a deploy, predictions through the gateway
	@echo "==> 1/5 two hosts on this machine"
	@$(BIN)/python -m lab up
	@echo "==> 2/5 a model, trained with DistributedDataParallel"
	@if ls models/digits/*/manifest.json >/dev/null 2>&1; then echo "there is one in models/digits"; \
	  else $(MAKE) --no-print-directory model; fi
	@echo "==> 3/5 wheels for the hosts, which need no internet"
	@$(BIN)/python -m provision.wheelhouse build --if-missing
	@$(BIN)/python -m provision.compiled --if-possible
	@echo "==> 4/5 pyinfra inventory.py deploy.py"
	@$(BIN)/pyinfra -y inventory.py deploy.py
	@at=$$($(BIN)/python -m lab gateway) && echo "==> 5/5 test images through ws://$$at" \
	  && $(BIN)/python -m gpu_service predict "ws://$$at" --bundle models/digits \
	  && sed "s/localhost:8009/$$at/" docs/after-deploy.txt

drift: $(READY) ## what differs from the declared state (exit codes: docs/runbook.md)
	@$(BIN)/python -m provision.drift $(INVENTORY)

down: $(READY) ## stop the lab's hosts and remove them
	@$(BIN)/python -m lab down

model: $(READY) ## train the example model with DistributedDataParallel
	@OMP_NUM_THREADS=1 TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 $(BIN)/torchrun --standalone --nproc-per-node=2 -m gpu_service.training --output models

wheelhouse: $(READY) ## wheels for hosts (the CPU build of torch; GPUs: README), and the service compiled
	@$(BIN)/python -m provision.wheelhouse build
	@$(BIN)/python -m provision.compiled --if-possible

test: can-host $(READY) lint ## everything, including deploys on lab hosts (root on Linux; gcc, Python's headers)
	@$(BIN)/python -m pytest --numprocesses 2

.PHONY: test-selinux
test-selinux: can-host $(READY) ## nginx under SELinux, in a virtual machine (minutes; 2 GiB)
	@$(BIN)/python -m pytest tests/selinux $(if $(wildcard models/digits/*/manifest.json),--bundle models/digits)

test-unit: $(READY) ## what needs neither root nor hosts (gcc, Python's headers)
	@$(BIN)/python -m pytest --numprocesses 2 -m "not lab"

bench: $(READY) ## the service's speed and memory (gcc, Python's headers; docs/benchmarks.md, bench/results/)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements/bench.txt
	@$(BIN)/python -m bench

bench-deploy: can-host $(READY) ## deploys: against Ansible, under traffic, killed (root; lab hosts; an hour)
	@$(BIN)/python -m bench ansible changes rolling interrupts

bench-peers: $(READY) ## the service against mosec and pytriton, each in .bench/ (2.5 GB; gcc, Python's headers)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements/bench.txt
	@$(BIN)/python -m bench peers

FUZZ_SECONDS ?= 60
fuzz: $(READY) ## coverage-guided fuzzing; FUZZ_SECONDS=60 for each target
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements/fuzz.txt
	@for target in frames manifests service session; do \
	  echo "==> fuzz.$$target"; $(BIN)/python -m fuzz.$$target --seconds $(FUZZ_SECONDS) || exit 1; done

lint: $(READY) ## ruff and mypy --strict
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: $(READY) ## the generated references in docs/
	@$(BIN)/python -m provision.settings > docs/settings.md
	@$(BIN)/python -m provision.nginx_versions > docs/nginx-versions.md

lock: $(READY) ## pin requirements/*.txt anew
	@$(BIN)/python requirements/lock.py

clean: ## remove what was generated; not models/
	@rm -rf $(VENV) .wheelhouse .bench .mypy_cache .pytest_cache .ruff_cache .hypothesis
