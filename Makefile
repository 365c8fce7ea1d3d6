# make demo             all steps from a small synthetic set to a submission; DATA=folder for real data
# make test             lint, check types and run the quick tests, JOBS (2) at a time
# make test-slow        the slow tests alone, JOBS (2) at a time
# make test-loops       the tests with other people's training loops (Lightning and others), which it
#                       installs into .venv
# make test-readers     the tests with other programs that read shards (Hugging Face datasets, Energon
#                       and others), in environments of their own, beside .venv
# make test-all         all tests, those for GPUs too, one at a time
# make check            lint and check types only
# make lowest           try the lowest versions of all dependencies, in a temporary environment
# make bench            measure the loaders beside other libraries, in an environment of its own,
#                       and write scripts/results/; DATA=folder for real data
# make bench-train      measure training beside the homework's code, and ways to attend, and write
#                       scripts/results/{train,attention}.json; DATA=folder of a data set,
#                       ARGS='--batch 32 --batch 2048' and other options of scripts.bench_train
# make bench-gpu        measure training on this machine's GPU in under 8 minutes, beside what was
#                       predicted for it, and write scripts/results/gpu.json
# make bench-remote     measure shards behind a network with faults, from a real S3 server on this
#                       machine, and write scripts/results/remote.json
# make ladder           train every rung on the data set in DATA=folder, which holds Dataset/ and
#                       test_labels.csv, and write scripts/results/ladder.*; ARGS='--width 144' for
#                       CPUs
# make torture          damage sets and builds in every way, kill and resume training, let every call
#                       of the system fail in every command (needs gcc), train for MINUTES (10), and
#                       write scripts/results/{torture,program,recordings,kills,errors,soak}.json;
#                       half an hour
# make fuzz             fuzz every reader of foreign files for SECONDS (600) each, in an environment of
#                       its own; findings go to fuzz-found/, figures to scripts/results/fuzz.json
# make clean            remove what these made (not the data)

PYTHON ?= python3
VENV ?= .venv
BENCH_VENV ?= .venv-bench
FUZZ_VENV ?= .venv-fuzz
READERS_VENV ?= .venv-readers
DATA ?=
ARGS ?=
MINUTES ?= 10
JOBS ?= 2
SECONDS ?= 600
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow test-loops test-readers test-all lowest check bench bench-train bench-gpu bench-remote ladder torture fuzz clean

$(INSTALLED): pyproject.toml constraints.txt
	@echo 'Installing into $(VENV), some gigabytes; pip says nothing for minutes'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED)
	BIN=$(BIN) DATA='$(DATA)' sh scripts/demo.sh

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/pytest -n $(JOBS) --dist worksteal -m 'not slow and not gpu and not loops and not readers'

test-slow: $(INSTALLED)
	$(BIN)/pytest -n $(JOBS) --dist worksteal -m 'slow and not gpu and not loops and not readers'

# Their packages must not change the version of PyTorch that all tests run with.
test-loops: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,loops]'
	SHARDPREP_TEST_LOOPS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal tests/loops

# An environment that adds packages to those of .venv, which stays as it is.
$(READERS_VENV)/%/.made: $(INSTALLED)
	$(BIN)/python -m venv --without-pip $(@D)
	$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
		> $$(echo $(@D)/lib/python*/site-packages)/below.pth
	touch $@

# Releases of datasets before that in constraints.txt.
$(READERS_VENV)/datasets-%/.installed: $(READERS_VENV)/datasets-%/.made
	$(BIN)/python -m pip --python $(@D)/bin/python install --quiet 'datasets==$*'
	touch $@

$(READERS_VENV)/all/.installed: $(READERS_VENV)/all/.made
	$(BIN)/python -m pip --python $(@D)/bin/python install --quiet -c constraints.txt -e '.[readers]'
	touch $@

test-readers: $(READERS_VENV)/all/.installed $(READERS_VENV)/datasets-4.8.5/.installed \
		$(READERS_VENV)/datasets-3.6.0/.installed
	SHARDPREP_TEST_READERS=$(READERS_VENV) $(BIN)/pytest -n $(JOBS) --dist worksteal tests/readers

test-all: check
	$(BIN)/pytest

lowest: $(INSTALLED)
	$(BIN)/python -m scripts.lowest

# mosaicml-streaming pins old versions of libraries that it needs for text, images and clouds only,
# so that pip finds no set of versions with the other peers; what it does need is in the extra.
$(BENCH_VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	$(BENCH_VENV)/bin/python -m pip install --quiet -c constraints.txt --no-deps mosaicml-streaming
	touch $@

bench: $(BENCH_VENV)/.installed
	$(BENCH_VENV)/bin/python -m scripts.bench.loader $(if $(DATA),--dataset '$(DATA)') \
		--out scripts/results/loader.json --plot scripts/results/loader.png

bench-train: $(BENCH_VENV)/.installed
	$(BENCH_VENV)/bin/python -m scripts.bench_train $(if $(DATA),--dataset '$(DATA)') \
		--out scripts/results/train.json $(ARGS)
	$(BENCH_VENV)/bin/python -m scripts.bench.attention --out scripts/results/attention.json

bench-gpu: $(INSTALLED)
	$(BIN)/python -m scripts.bench_train.gpu --out scripts/results/gpu.json $(ARGS)

bench-remote: $(INSTALLED)
	$(BIN)/python -m scripts.bench_remote --out scripts/results/remote.json $(ARGS)

ladder: $(BENCH_VENV)/.installed
	@test -n '$(DATA)' || { echo 'make ladder DATA=folder, with Dataset/ and test_labels.csv'; exit 2; }
	$(BENCH_VENV)/bin/python -m scripts.ladder --data '$(DATA)' \
		--out scripts/results/ladder.json --plot scripts/results/ladder.png $(ARGS)

torture: $(INSTALLED)
	$(BIN)/python -m scripts.torture.shards --out scripts/results/torture.json
	$(BIN)/python -m scripts.torture.program --out scripts/results/program.json
	$(BIN)/python -m scripts.torture.recordings --out scripts/results/recordings.json
	$(BIN)/python -m scripts.torture.training --rounds 20 --out scripts/results/kills.json
	$(BIN)/python -m scripts.torture.errors --out scripts/results/errors.json
	$(BIN)/python -m scripts.torture.soak --minutes $(MINUTES) --out scripts/results/soak.json

$(FUZZ_VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(FUZZ_VENV)
	$(FUZZ_VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[fuzz]'
	touch $@

fuzz: $(FUZZ_VENV)/.installed
	$(FUZZ_VENV)/bin/python -m scripts.torture.fuzz --seconds $(SECONDS) --found fuzz-found \
		--out scripts/results/fuzz.json

clean:
	rm -rf $(VENV) $(BENCH_VENV) $(FUZZ_VENV) $(READERS_VENV) demo build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
