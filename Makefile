# Everything a newcomer needs is Python >= 3.10, make and cargo; the rest is set up in .venv on first use.
# `make help` lists the targets. Stamp files in .venv/ remember what is done, so a second run starts at once.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

# PYTHON=... chooses the interpreter; otherwise the first one that really runs and is new enough.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do \
	if "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then echo "$$p"; break; fi; done)
VENV := .venv
BIN := $(VENV)/bin
GOLDEN_VENV := .venv-golden

RUST_SOURCES := Cargo.toml Cargo.lock $(shell find src -name '*.rs' -o -name '*.jinja')
PYTHON_SOURCES := pyproject.toml README.md LICENSE $(shell find python -type f -not -name '*.so' -not -path '*/__pycache__/*')
TYPED := python scripts $(wildcard tests/golden/*.py)

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

.PHONY: build
build: $(VENV)/installed ## build the wheel and install it into .venv

.PHONY: quickstart
quickstart: $(VENV)/installed ## fine-tune the model we ship, end to end, offline (a minute or two)
	$(BIN)/rustune quickstart --out quickstart-out

.PHONY: test
test: $(VENV)/installed $(VENV)/fetched ## Rust tests, then Python tests against the installed wheel
	cargo test --locked --offline
	$(BIN)/python -m pytest

.PHONY: notebooks
notebooks: $(VENV)/installed ## run every notebook top to bottom (two minutes)
	$(BIN)/python scripts/run_notebooks.py

.PHONY: check
check: $(VENV)/installed $(VENV)/fetched ## formatters, linters, type checkers, docs, spelling, tidiness
	cargo fmt --all --check
	cargo clippy --locked --offline --all-targets -- -D warnings
	cargo clippy --locked --offline --all-targets --features python -- -D warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict $(TYPED)
	MYPYPATH=python $(BIN)/python -m mypy.stubtest --mypy-config-file pyproject.toml rustune._native
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --offline --no-deps
	$(BIN)/typos
	cargo test --locked --offline --test rust tidy

.PHONY: fmt
fmt: $(VENV)/ready ## format everything in place
	cargo fmt --all
	$(BIN)/ruff check --fix-only --quiet . || true
	$(BIN)/ruff format .

.PHONY: bench
bench: $(VENV)/fetched ## Rust benchmarks, release profile
	cargo bench --locked --offline --benches

.PHONY: sanitize
sanitize: $(VENV)/fetched ## tests of kernels, ops, quant and io under AddressSanitizer (x86-64 Linux; builds all anew)
	RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address ASAN_OPTIONS=detect_leaks=0 cargo test --locked --offline --lib \
		--target x86_64-unknown-linux-gnu --target-dir target/sanitize --config 'profile.dev.package."*".opt-level=0' \
		-- kernels:: ops:: quant:: io::

.PHONY: bench-train
bench-train: $(VENV)/installed ## seconds, tokens and memory of training steps; PEER=python with torch, peft, bitsandbytes
	$(BIN)/python benches/train.py --shape llama-3.2-1b-4l --batch 1 --seq 512 $(if $(PEER),--peer-python $(PEER))
	$(BIN)/python benches/train.py --shape llama-3.2-1b-4l --batch 8 --seq 512 --real-lengths

.PHONY: golden
golden: $(GOLDEN_VENV)/ready ## make the golden files anew from torch, transformers, PEFT and bitsandbytes (heavy)
	$(GOLDEN_VENV)/bin/python tests/golden/make_golden.py

.PHONY: peers
peers: $(VENV)/installed $(GOLDEN_VENV)/ready ## test notebooks and objects beside torch, transformers, PEFT and TRL (heavy)
	$(GOLDEN_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all: \
		-r requirements-dev.txt trl==1.16.0
	$(GOLDEN_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps dist/*.whl
	$(GOLDEN_VENV)/bin/python -m pytest tests/python/test_drop_in.py tests/python/test_drop_in_notebooks.py \
		tests/python/test_peers.py

.PHONY: model
model: $(VENV)/installed ## train the shipped model anew, from nothing, with our own engine (up to 30 minutes)
	$(BIN)/python scripts/train_shipped_model.py

.PHONY: clean
clean: ## remove everything make made, except the shipped model
	rm -rf $(VENV) $(GOLDEN_VENV) dist target quickstart-out outputs .mypy_cache .ruff_cache .pytest_cache

# $(call make_venv,FOLDER,REQUIREMENTS)
define make_venv
	@if [ -z "$(PYTHON)" ]; then \
		echo "No Python 3.10 or newer found. Install one, or say: make PYTHON=/path/to/python3" >&2; exit 1; fi
	@if ! "$(PYTHON)" -c 'import venv, ensurepip' >/dev/null 2>&1; then \
		echo "$(PYTHON) cannot make virtual environments: its venv or ensurepip module is missing." >&2; \
		echo "On Debian and Ubuntu: sudo apt-get install python3-venv   (then run make again)" >&2; exit 1; fi
	"$(PYTHON)" -m venv --clear $(1)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all: -r $(2)
endef

$(VENV)/ready: requirements-dev.txt
	$(call make_venv,$(VENV),$<)
	@touch $@

$(GOLDEN_VENV)/ready: tests/golden/requirements.txt
	$(call make_venv,$(GOLDEN_VENV),$<)
	@touch $@

# The crates of Cargo.lock for every platform (maturin asks for them all), so that everything after runs offline.
$(VENV)/fetched: Cargo.lock $(VENV)/ready
	@command -v cargo >/dev/null || { echo "cargo is missing: install Rust, https://rustup.rs" >&2; exit 1; }
	cargo fetch --locked
	@touch $@

$(VENV)/installed: $(VENV)/ready $(VENV)/fetched $(RUST_SOURCES) $(PYTHON_SOURCES)
	rm -rf dist
	$(BIN)/maturin build --release --locked --offline --quiet --interpreter $(BIN)/python --out dist
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps dist/*.whl
	@touch $@
