# `make test` runs all checks, the quickest ones first. `make help` lists the targets.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
export PATH := $(CURDIR)/target/tools/bin:$(PATH)

.PHONY: help demo test chaos chaos-short mutants bench saturation saturation-short bench-http bench-curves bench-languages bench-peers bench-retention fuzz-sql fuzz-sql-short chaos-host bindings build install-tools demo-tools walk links prose format lint docs deny advisories dist run-tests

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: demo-tools build ## Run the demo: payments over HTTP, duplicates, lost responses, a kill, checked books
	cargo build --locked -p oncely-tests --bin demo || { $(CANNOT_BUILD); }
	@cargo run --quiet --locked -p oncely-tests --bin demo

test: install-tools ## Run all checks, all tests and the demo
	$(MAKE) links
	$(MAKE) prose
	$(MAKE) format
	$(MAKE) lint
	$(MAKE) docs
	$(MAKE) deny
	$(MAKE) fuzz-sql-short
	$(MAKE) chaos-short
	$(MAKE) run-tests
	$(MAKE) demo

chaos: install-tools chaos-host ## Inject faults under load on both databases and check the books: 15 minutes
	$(CHAOS) $(ARGS)

chaos-short: chaos-host ## Run a shorter chaos: two minutes
	$(CHAOS) --short --inputs 800 --minutes 1.5 $(ARGS)

mutants: install-tools ## Break each guarantee on purpose; the books must detect it
	scripts/build-mutants $(BUILD)
	$(CHAOS) --mutants $(ARGS)

fuzz-sql: install-tools ## Fuzz the statement filter and PostgreSQL with ten million statements: 15 minutes
	$(FUZZ_SQL) $(ARGS)

fuzz-sql-short: ## Fuzz for one minute
	$(FUZZ_SQL) --seconds 60 $(ARGS)

# Example of ARGS: `--seed 7 --show 1000`.
FUZZ_SQL = cargo run --quiet --locked -p oncely-tests --bin fuzz-sql --

bench: install-tools ## Compare a release build with hand-written programs: 20 minutes
	cargo build --locked --release -p oncely -p oncely-tests
	target/release/bench $(ARGS)

saturation: install-tools ## Overload a host for five minutes and measure the publish delay
	cargo build --locked --release -p oncely -p oncely-tests
	target/release/bench --saturate 300 $(ARGS)

# For CI: uses the debug build of the tests.
saturation-short: build ## Overload a host for 30 seconds
	cargo run --quiet --locked -p oncely-tests --bin bench -- --saturate 30 $(ARGS)

bench-http: install-tools ## Compare requests over HTTP with hand-written services: three minutes
	cargo build --locked --release -p oncely -p oncely-tests
	target/release/bench --http 5
	target/release/bench --requests 5 $(ARGS)

bench-curves: install-tools ## Measure messages per second as the work grows, and draw docs/curves.svg: 15 minutes
	cargo build --locked --release -p oncely -p oncely-tests
	target/release/bench --curves --rounds 3 $(ARGS)

bench-languages: install-tools ## Compare the languages of handlers, from the first build to messages per second: 15 minutes
	cargo build --locked --release -p oncely -p oncely-tests
	target/release/bench --languages $(ARGS)

bench-peers: install-tools ## Compare keyed state with Restate and DBOS, which it installs in target/: 15 minutes
	scripts/install-peers
	CARGO_TARGET_DIR=target/peers cargo build --locked --release --manifest-path tests/peers/restate/Cargo.toml
	cargo build --locked --release -p oncely -p oncely-tests
	target/release/bench --peers $(ARGS)

bench-retention: install-tools ## Insert and expire ten million rows of inbox and outbox: 30 minutes
	cargo build --locked --release -p oncely-tests --bin bench
	target/release/bench --retention 10000000 $(ARGS)

# Example of ARGS: `--database sqlite --seed 7 --batch 1`.
CHAOS = cargo run --quiet --locked -p oncely-tests --bin chaos --

# A host with crash points. It is built into another folder than the ordinary one.
chaos-host:
	cargo build --locked -p oncely --bin oncely --features faults
	mkdir -p target/chaos
	cp target/debug/oncely target/chaos/oncely.new
	mv target/chaos/oncely.new target/chaos/oncely

bindings: ## Regenerate the bindings of the guest SDK after a change in wit/
	ONCELY_WRITE_BINDINGS=1 cargo test --locked -p oncely-tests --test it -- bindings::

build: ## Build the binary
	cargo build --locked --bin oncely || { $(CANNOT_BUILD); }

# The usual reason on a new machine: no downloaded crates and no network.
CANNOT_BUILD = echo "error: cargo build failed, see above; without a network, run \`cargo fetch --locked\` once where there is one" >&2; exit 1

install-tools: ## Install missing tools of the tests
	@scripts/install-tools test

demo-tools: ## Install missing tools of the demo
	@scripts/install-tools demo

walk: build ## Write the pictures and the commands of the walk in docs/console.md
	ONCELY_WRITE_WALK=1 cargo test --locked -p oncely-tests --test it -- console::walk

prose: ## Check the wording of documents and comments
	python3 tests/prose.py

links: ## Check the links in *.md
	python3 tests/links.py

format: ## Check the code format
	cargo fmt --all --check

lint: ## Run clippy with warnings as errors
	cargo clippy --locked --workspace --all-targets -- -D warnings

docs: ## Build the API docs with warnings as errors
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps

deny: ## Check licences, sources and bans of dependencies, see deny.toml
	cargo deny check bans licenses sources

advisories: ## Fetch the advisory database and check dependencies
	cargo deny check advisories

dist: ## Build the release files in dist/: program, completions, unit, licences, checksums
	scripts/dist

# The end-to-end tests run the binary, so it is built first. They compile the guests once. They wait
# more than they compute, so there are more test threads than cores.
run-tests: build ## Run all tests
	RUST_TEST_THREADS=$${RUST_TEST_THREADS:-4} cargo test --locked --workspace
