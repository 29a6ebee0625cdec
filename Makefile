# Everything a contributor types. `make help` lists it.
# Another target directory: make TARGET_DIR=… ; another cluster directory: CRATON_DIR=…

SHELL := /bin/bash
TARGET_DIR ?= $(if $(CARGO_TARGET_DIR),$(CARGO_TARGET_DIR),target)
CRATON := $(TARGET_DIR)/release/craton
# Where a fresh rustup puts cargo.
export PATH := $(PATH):$(HOME)/.cargo/bin
CARGO := cargo

.DEFAULT_GOAL := help
.PHONY: help setup setup-tests build up down check verify fix test test-hosts sim model bench bench-failover bench-handshake fuzz images test-containers deb

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## install what is missing: PostgreSQL, PostGIS, compiler, Rust
	@scripts/setup.sh

build: setup ## the release build
	$(CARGO) build --release --locked -p craton

up: build ## build, and start a local cluster with a sample map
	$(CRATON) up

down: ## stop the local cluster (make down PURGE=1 removes it)
	@if [ -x $(CRATON) ]; then $(CRATON) down $(if $(PURGE),--purge); else echo "nothing is built, so nothing was started from here"; fi

check: setup ## the quick look before a commit, below five minutes
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	$(CARGO) test --locked -p craton-core -p craton-wire -p craton-repo -p craton-console
	$(CARGO) test --locked -p craton --lib --test tidy

verify: setup ## format, lints, documentation, tidy, licences: never writes to the tree
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" $(CARGO) doc --locked --workspace --no-deps --document-private-items
	$(CARGO) test --locked -p craton --test tidy
	@if command -v cargo-deny >/dev/null; then cargo deny check; else echo "cargo-deny is not installed: licences are checked by tidy, advisories are not checked here"; fi

fix: setup ## format, apply what clippy knows, write the reference pages again
	$(CARGO) fmt --all
	$(CARGO) clippy --locked --workspace --all-targets --fix --allow-dirty --allow-staged
	CRATON_WRITE_DOCS=1 $(CARGO) test --locked -p craton --test tidy

setup-tests:
	@scripts/setup.sh --tests

test: setup-tests ## everything CI runs: all tests, on real PostgreSQL with PostGIS
	$(CARGO) test --locked --workspace --no-fail-fast

test-hosts: setup ## every real fault on hosts in network namespaces (root; LONG=1: rolling kills for 20 minutes)
	CI=true CRATON_TEST_ROLLING_MINUTES=$(if $(LONG),20,2) $(CARGO) test --locked -p craton --test hosts -- --include-ignored --nocapture

sim: setup ## the simulator: SEEDS=0..20000, or one seed with its trace: SEED=17
	$(CARGO) run --release --locked -p craton-sim -- $(if $(SEED),--seed $(SEED) --trace,--seeds $(or $(SEEDS),0..20000)) $(ARGS)

model: setup ## the model check, further than the tests: DEPTH=2 (or 3), ONLY=3, STATES=…, BROKEN=all or one rule
	$(CARGO) run --release --locked -p craton-sim -- model --level $(or $(DEPTH),2) $(if $(ONLY),--only $(ONLY)) $(if $(STATES),--states $(STATES)) $(if $(BROKEN),--broken $(BROKEN))

bench: build ## outages and losses, measured by drills (long)
	benches/drills.sh $(CRATON) $(RUNS)

bench-failover: setup ## Craton beside Patroni, same faults, about 40 minutes (root; RUNS=3 PATRONI_RUNS=1 FAULTS=… SYSTEMS=…)
	benches/failover/install.sh $(abspath $(TARGET_DIR))/patroni
	CRATON_TEST_DISKS=$(or $(DISKS),/dev/shm) PATRONI_VENV=$(abspath $(TARGET_DIR))/patroni OUT=$(or $(OUT),$(abspath $(TARGET_DIR))/failover.jsonl) $(CARGO) bench --locked -p craton --bench failover

bench-handshake: setup ## what a mutual TLS handshake between two parts costs (a minute)
	$(CARGO) bench --locked -p craton-trust --bench handshake

fuzz: ## there are no fuzz targets yet
	@echo "there are no fuzz targets yet; property tests of the parsers run in 'make test'"

images: ## the container images craton/postgis, craton/proxy, craton/backup (TAG=latest; works where none can be pulled)
	@scripts/setup.sh --images
	scripts/images.sh

deb: build ## a Debian package with the program, systemd units and documentation, in target/
	scripts/deb.sh $(CRATON) $(TARGET_DIR)

test-containers: setup-tests ## every container scenario, about half an hour (needs a Docker engine)
	$(CARGO) test --locked -p craton --test containers -- --include-ignored --nocapture
