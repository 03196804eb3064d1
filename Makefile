# `make test` checks everything, the quickest checks first. `make help` lists the targets.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
export PATH := $(CURDIR)/target/tools/bin:$(PATH)

.PHONY: help demo test chaos chaos-short mutants bench saturation saturation-short bench-http bench-retention fuzz-sql fuzz-sql-short chaos-host bindings build install-tools demo-tools links format lint docs deny advisories dist run-tests

help: ## Say what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: demo-tools build ## Show it: payments over HTTP, duplicates, lost answers, a kill in the middle, and then the books
	cargo build --locked -p oncely-tests --bin demo || { $(CANNOT_BUILD); }
	@cargo run --quiet --locked -p oncely-tests --bin demo

test: install-tools ## Check links, format, lints, docs and dependencies, then run all tests and the demo
	$(MAKE) links
	$(MAKE) format
	$(MAKE) lint
	$(MAKE) docs
	$(MAKE) deny
	$(MAKE) fuzz-sql-short
	$(MAKE) chaos-short
	$(MAKE) run-tests
	$(MAKE) demo

chaos: install-tools chaos-host ## Kill, pause and cut a host under load on both databases, then check the books: a quarter of an hour
	$(CHAOS) $(ARGS)

chaos-short: chaos-host ## The same in two minutes
	$(CHAOS) --short --inputs 800 --minutes 1.5 $(ARGS)

mutants: install-tools ## Break the host on purpose, promise by promise; the books must notice each time
	scripts/build-mutants
	$(CHAOS) --mutants $(ARGS)

fuzz-sql: install-tools ## Hold ten million generated statements against the statement filter and PostgreSQL: a quarter of an hour
	$(FUZZ_SQL) $(ARGS)

fuzz-sql-short: ## The same for a minute
	$(FUZZ_SQL) --seconds 60 $(ARGS)

# ARGS may be, for example, `--seed 7 --show 1000`.
FUZZ_SQL = cargo run --quiet --locked -p oncely-tests --bin fuzz-sql --

bench: install-tools ## Measure a release build against a hand-written loop: a quarter of an hour
	cargo build --locked --release -p oncely -p oncely-tests
	target/release/bench $(ARGS)

saturation: install-tools ## Give a host more than it can do for five minutes, and see how long outputs wait
	cargo build --locked --release -p oncely -p oncely-tests
	target/release/bench --saturate 300 $(ARGS)

# With the build that tests use, for CI.
saturation-short: build ## The same for half a minute
	cargo run --quiet --locked -p oncely-tests --bin bench -- --saturate 30 $(ARGS)

bench-http: install-tools ## Measure a cached read over HTTP against a constant: a minute
	cargo build --locked --release -p oncely -p oncely-tests
	target/release/bench --http 5 $(ARGS)

bench-retention: install-tools ## Send ten million rows through inbox and outbox while old ones leave: half an hour
	cargo build --locked --release -p oncely-tests --bin bench
	target/release/bench --retention 10000000 $(ARGS)

# ARGS may be, for example, `--database sqlite --seed 7 --batch 1`.
CHAOS = cargo run --quiet --locked -p oncely-tests --bin chaos --

# The host with crash points, beside the one that is released.
chaos-host:
	cargo build --locked -p oncely --bin oncely --features faults
	mkdir -p target/chaos
	cp target/debug/oncely target/chaos/oncely.new
	mv target/chaos/oncely.new target/chaos/oncely

bindings: ## Generate the guest SDK's bindings again, after a change in wit/
	ONCELY_WRITE_BINDINGS=1 cargo test --locked -p oncely-tests --test it -- bindings::

build: ## Build the binary
	cargo build --locked --bin oncely || { $(CANNOT_BUILD); }

# The usual reason on a machine that never built this: the crates of Cargo.lock are not there, and neither is a network.
CANNOT_BUILD = echo "error: cargo could not build; its messages stand above. Without a network: run \`cargo fetch --locked\` once where there is one." >&2; exit 1

install-tools: ## Install what the tests need and this machine lacks
	@scripts/install-tools test

demo-tools: ## Install what the demo needs and this machine lacks
	@scripts/install-tools demo

links: ## Check that links in *.md lead somewhere
	python3 tests/links.py

format: ## Check the format
	cargo fmt --all --check

lint: ## Run clippy; warnings are errors
	cargo clippy --locked --workspace --all-targets -- -D warnings

docs: ## Build the API docs; warnings are errors
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps

deny: ## Check licences, sources and bans of dependencies; see deny.toml
	cargo deny check bans licenses sources

advisories: ## Check dependencies against the advisory database, which is fetched
	cargo deny check advisories

dist: ## Make what people install, in dist/: program, completions, unit, licences, checksums
	scripts/dist

# The end-to-end tests run the binary, so it is built first; they compile the guests themselves, once. They wait more than
# they compute, so there are more of them at once than cores.
run-tests: build ## Run all tests
	RUST_TEST_THREADS=$${RUST_TEST_THREADS:-4} cargo test --locked --workspace
