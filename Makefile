# make demo   a real model, made honest: build it and try it        make test   lint, types, tests
# make tiny   the same machinery on a model trained from nothing, without any download
# make install   only sets up .venv
# All set up what they need in .venv; CONTRIBUTING.md says what each part is for.

PYTHON ?= python3
BIN := .venv/bin
TESTS ?= tests
JOBS ?= auto

# llama.cpp is compiled from source; its tools, examples and server are not needed.
export CMAKE_ARGS ?= -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF \
	-DLLAMA_BUILD_SERVER=OFF -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF -DLLAMA_CURL=OFF
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell nproc)

# Corrects GCC's intrinsics for AMX, with which llama.cpp would end at the first prompt on processors that have it.
# pip's cache may hold a llama.cpp that was compiled without the correction, so it is not used for that package.
export CXXFLAGS := $(CXXFLAGS) -include "$(CURDIR)/amx_intrinsics.h"

.PHONY: install demo tiny test lint types format clean

install: .venv/build

demo: .venv/build
	$(BIN)/cogumi demo

tiny: .venv/build
	$(BIN)/cogumi build tiny

# A process per core, each with one thread: several threads each would only wait for one another.
test: .venv/dev lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(TESTS)

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev
	$(BIN)/mypy

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The stamp files say which extra is installed; dev contains build.
.venv/build: pyproject.toml constraints.txt
	@echo "Installing (6 to 10 minutes on two cores, most of it compiling llama.cpp) ..."
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-cache-dir --constraint constraints.txt llama-cpp-python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[build]'
	touch $@

.venv/dev: .venv/build
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv runs dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
