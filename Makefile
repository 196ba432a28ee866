# Ballast's commands. Each does its own set-up (see scripts/setup); `make help` lists them.
#
# SAN=file make demo      the demo's store is a file, and its outage a drill, instead of an iSCSI LUN that is cut off
# FUZZ_SECONDS=60         time per fuzz target

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Steps of one command share cargo's lock and the disk: run them one after the other.
.NOTPARALLEL:

FUZZ_SECONDS ?= 10
# In CI the lock file is part of what is tested.
LOCKED := $(if $(CI),--locked)

step = @printf '\n==> %s\n' "$(1)"

.PHONY: help demo test bench fuzz lint build setup setup-build setup-test setup-fuzz programs unit-and-system-tests

help: ## Lists these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: setup-build setup-test ## A guest's disk survives a kill -9 of the agent and an outage of the store, before your eyes
	$(call step,build)
	cargo build $(LOCKED) --release -p agent -p tests --bins
	$(call step,demo)
	@target/release/demo

test: setup lint programs unit-and-system-tests fuzz ## Everything: lint, all tests with real guests and targets, a short run of each fuzz target
	$(call step,all passed)

bench: setup-build setup-test ## Measures Ballast beside its peers and writes docs/benchmarks.md
	$(call step,build)
	cargo build $(LOCKED) --release -p agent -p bench --bins
	$(call step,bench)
	@target/release/bench all --markdown docs/benchmarks.md

fuzz: setup-fuzz ## Runs each fuzz target for FUZZ_SECONDS
	$(call step,fuzz: $(FUZZ_SECONDS) s per target)
	@scripts/fuzz $(FUZZ_SECONDS)

lint: setup-build ## Format and clippy, warnings are errors
	$(call step,lint)
	cargo fmt --all --check
	@if [ -e fuzz/Cargo.toml ]; then cargo fmt --manifest-path fuzz/Cargo.toml --check; fi
	cargo clippy $(LOCKED) --workspace --all-targets --quiet -- -D warnings

build: setup-build ## The ballast program: target/release/ballast
	$(call step,build)
	cargo build $(LOCKED) --release -p agent --bins

setup: setup-build setup-test setup-fuzz ## Installs what is missing, without building anything

setup-build:
	@scripts/setup build

setup-test:
	@scripts/setup test

setup-fuzz:
	@scripts/setup build fuzz

# Whole-system tests run the programs of the same profile. One profile (dev, optimised: see Cargo.toml), so that
# nothing is compiled twice.
programs:
	$(call step,build)
	cargo build $(LOCKED) --workspace --bins

unit-and-system-tests:
	$(call step,tests)
	cargo test $(LOCKED) --workspace --no-fail-fast
	$(call step,deliberate bugs: the simulator and the tests of collection must find each)
	cargo test $(LOCKED) -p tests -p gc --features tests/sabotage,gc/sabotage --test sim --test collect deliberate -- --nocapture
