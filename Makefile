# make train       the demo: set-up, base checkpoint, training on every GPU, or on 2 CPU ranks
# make test        all but slow ones and faults (CI runs this); test-fast: without those that start several processes
# make test-faults what happens when a run is killed, preempted or fed bad input (CI runs this too)
# make memory      the proof that TTT remembers: trains with and without it, plots loss against the gap
# make setup       .venv with the pinned packages; another torch build by TORCH, e.g. a CUDA index:
#                  make setup TORCH="torch==2.11.0 --index-url https://YOUR-INDEX/cu130"
#                  which every later target keeps, until TORCH names another

PYTHON ?= python3
VENV := .venv
PINNED := torch==2.13.0
TORCH ?= $(or $(shell cat $(VENV)/.torch 2>/dev/null),$(PINNED))
PY := $(VENV)/bin/python
# Named after what it installs, so that a changed pin or TORCH sets up again.
STAMP := $(VENV)/.installed-$(shell (echo "$(TORCH)"; cat requirements.txt) | cksum | cut -d' ' -f1)

.PHONY: setup train memory test test-fast test-faults test-slow lint format

setup: $(STAMP)

$(STAMP): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V); use make PYTHON=..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet $(TORCH)
	# Another build than the pinned one is kept by later targets.
	@rm -f $(VENV)/.torch
	@test "$(TORCH)" = "$(PINNED)" || echo "$(TORCH)" > $(VENV)/.torch
	$(PY) -m pip install --quiet -r requirements.txt
	# moshi pins an older torch and pulls in audio devices and quantisation that training has no use
	# for; what it does need stands in requirements.txt.
	$(PY) -m pip install --quiet --no-deps moshi==0.2.13
	rm -f $(VENV)/.installed-*
	touch $@

train: setup
	$(PY) -m launch.make_demo_base
	./torchrun.sh launch/train.py configs/demo.yaml

memory: setup
	$(PY) -m launch.memory --out docs/memory

test: setup
	$(PY) -m pytest tests -m "not slow and not gpu and not faults"

test-fast: setup
	$(PY) -m pytest tests -m "not slow and not gpu and not faults and not distributed and not integration"

test-faults: setup
	$(PY) -m pytest tests -m "faults and not slow and not gpu"

test-slow: setup
	$(PY) -m pytest tests -m "slow"

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PY) -m mypy

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
