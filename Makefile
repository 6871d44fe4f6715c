# `make demo` and `make test` need nothing but python3 and make; `make help` lists all targets.
PYTHON ?= python3
ARGS ?=
JOBS ?= 2
# Tests that wait for ROS or for processes leave a core idle: three workers keep two cores busy.
WORKERS ?= 3
CONFIG ?= config/training/demo.yaml
CHECKPOINT ?= out/training/demo/policy
BUNDLE ?= models/demo

# With a ROS 2 installation sourced, the environment sees that installation's packages, so it gets its own folder.
VENV := .venv$(addprefix -,$(ROS_DISTRO))
RUN := $(VENV)/bin/python -m
REQUIREMENTS := $(wildcard requirements/*.txt)
# Plugins by name: a sourced ROS installation brings pytest plugins that break newer pytest versions.
# A worker that crashed is not replaced: with loadfile the run would wait for ever for the tests that it had.
# Files in the order of test/conftest.py: xdist's own, by the number of tests, leaves the longest ones to the end.
PYTEST := pytest -rs -p xdist -p pytest_timeout -p hypothesispytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0
RUFF := $(RUN) ruff check && $(RUN) ruff format --check
TESTING := OMP_NUM_THREADS=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1

export PYTHON
# The ROS wheels restart Python once with their library path; if this mark were inherited, they would not.
unexport _ROS_WHEELS_BOOTSTRAP_COMPLETE

.DEFAULT_GOAL := help
.PHONY: help demo aloha metaworld libero test coverage test-fast lint paths data train export evaluate clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

demo: $(VENV)/robot ## a simulated arm follows instructions over ROS 2; results in out/demo (ARGS="--episodes 3 --help ...")
	$(RUN) ki_vla_ros.demo $(ARGS)

aloha: $(VENV)/developer ## two other arms: demonstrated, recorded, converted, replayed, moved by the node; results in out/aloha
	$(VENV)/bin/python scripts/aloha $(ARGS)

metaworld: .venv-metaworld/metaworld ## MetaWorld's fifty tasks, in an environment of its own (.venv-metaworld), and their tests
	OMP_NUM_THREADS=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 .venv-metaworld/bin/python -m pytest -rs -p pytest_timeout $(or $(ARGS),test/unit/training/evaluate/test_metaworld.py test/unit/training/evaluate/test_protocols.py test/system/test_what_imports_cost.py)

libero: .venv-libero/libero ## LIBERO's five suites, in an environment of its own (.venv-libero), and their tests
	OMP_NUM_THREADS=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 .venv-libero/bin/python -m pytest -rs -p pytest_timeout $(or $(ARGS),test/unit/training/evaluate/test_libero.py test/unit/training/evaluate/test_protocols.py)

# mypy takes a minute of one core on a fresh clone: it runs beside the tests, and once more, to be read, if it fails.
test: $(VENV)/developer ## lint and every test (ARGS="test/bad/test_bundles.py" for some, WORKERS=3 processes)
	$(RUFF)
	$(RUN) mypy & \
	$(TESTING) $(RUN) $(PYTEST) $(ARGS); tested=$$?; \
	wait $$! || $(RUN) mypy && exit $$tested

coverage: $(VENV)/developer ## every test, counting the lines that run, which is slower
	$(RUN) coverage erase
	$(TESTING) $(RUN) coverage run -m $(PYTEST)
	$(RUN) coverage combine --quiet
	$(RUN) coverage report

test-fast: $(VENV)/developer ## unit tests and contracts without the slow ones, in about a minute (WORKERS=3)
	$(TESTING) $(RUN) $(PYTEST) -m "not slow" $(or $(ARGS),test/unit test/contracts)

lint: $(VENV)/developer ## ruff (rules, format) and mypy
	$(RUFF)
	$(RUN) mypy

paths: $(VENV)/developer ## count the code of the main paths: image to trajectory, batch to optimizer step, bag to figures
	ROS_LOG_DIR=out/log $(VENV)/bin/python scripts/paths

data: $(VENV)/developer ## make the demo's data in the simulator: out/data/demo (JOBS=2 processes); what is there is kept
	OMP_NUM_THREADS=1 $(RUN) training.data.simulated out/data/demo --workers $(JOBS)

train: $(VENV)/developer ## train the policy (CONFIG=config/training/demo.yaml, JOBS=2 processes); resumes where it stopped
	OMP_NUM_THREADS=1 $(RUN) torch.distributed.run --nproc-per-node $(JOBS) -m training.train $(CONFIG)

export: $(VENV)/developer ## write a bundle from a checkpoint (CHECKPOINT=..., BUNDLE=models/demo, ARGS)
	$(RUN) training.export --checkpoint $(CHECKPOINT) --out $(BUNDLE) --notes $(CONFIG:.yaml=.md) $(ARGS)

evaluate: $(VENV)/developer ## closed-loop figures of a bundle without ROS (BUNDLE=models/demo, ARGS="--episodes 20")
	$(RUN) training.evaluate $(BUNDLE) $(ARGS)

clean: ## remove the environments and everything that other targets wrote, except models
	rm -rf .venv .venv-* out build log *.egg-info .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/robot: scripts/environment $(REQUIREMENTS)
	scripts/environment $(VENV) robot
	@touch $@

$(VENV)/developer: scripts/environment $(REQUIREMENTS)
	scripts/environment $(VENV) developer
	@touch $(VENV)/robot $@

.venv-metaworld/metaworld: scripts/environment $(REQUIREMENTS)
	scripts/environment .venv-metaworld metaworld
	@touch $@

.venv-libero/libero: scripts/environment $(REQUIREMENTS)
	scripts/environment .venv-libero libero
	@touch $@
