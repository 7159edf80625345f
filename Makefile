# Finegrid's commands. Each makes .venv from the lock by itself; nothing else is to be set up.
#
#   make demo      the demo study, from raw data to the report (STUDY=name: another; CORES, MEMORY_MB: what it may use)
#   make orphans   what a killed snakemake left running: keep or end it, then unlock (STUDY=name)
#   make restore   a study's results, brought from the DVC remote after a clone (STUDY=name, RUN=id: that run alone)
#   make test      all tests
#   make lint      ruff, snakefmt, snakemake --lint
#   make setup     only the environment (then: source .venv/bin/activate)
#   make lock      write envs/ anew from the environment (after a change of packages)

SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
STUDY ?= insurance
MEMORY_MB ?= 7500
CORES ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo orphans restore test lint setup lock
.DEFAULT_GOAL := demo

demo: .venv/demo.done
	snakemake --cores $(CORES) --resources mem_mb=$(MEMORY_MB) --config study=$(STUDY) -- report
	finegrid check $(STUDY)

orphans: .venv/base.done
	@finegrid orphans $(STUDY)

restore: .venv/base.done
	@finegrid restore $(STUDY) $(if $(RUN),--run $(RUN))

test: .venv/demo.done .venv/test.done
	OMP_NUM_THREADS=1 python -m pytest --numprocesses $(CORES) --dist loadfile --no-loadscope-reorder

lint: .venv/test.done
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile workflow/rules
	snakemake --lint

setup: .venv/base.done

lock: .venv/demo.done .venv/test.done
	python envs/lock.py

.venv/base.done: envs/lock.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Finegrid needs Python 3.11 or newer: none found (set PYTHON=...)"; exit 1; }
	$(PYTHON) -m venv .venv
	pip install --progress-bar on -r envs/lock.txt
	pip install --no-deps --no-build-isolation -e .
	@touch $@

.venv/demo.done: .venv/base.done envs/demo.txt
	pip install --no-deps -r envs/demo.txt
	@touch $@

.venv/test.done: .venv/base.done envs/test.txt
	pip install -r envs/test.txt
	@touch $@
