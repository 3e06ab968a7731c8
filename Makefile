# `make` alone lists what there is. Everything runs in .venv, which `make setup` makes.
PYTHON_VENV := .venv/bin/python
# Several processes a test times several threads each would fight for the cores.
TEST := OMP_NUM_THREADS=1 $(PYTHON_VENV) -m pytest
# A machine with a GPU may bring its own PyTorch.
PYTHON_GPU := $(or $(wildcard .venv/bin/python),$(PYTHON),python3)
OUTPUT ?= benchmarks/results
BENCHMARK := $(PYTHON_GPU) benchmarks
PLOT = $(PYTHON_GPU) benchmarks/plot.py --results "$(OUTPUT)" --images "$(OUTPUT)"
SCRIPTS := .ci/run $(wildcard tests/setup/*.sh tools/*.sh examples/*.sh examples/*/*.sh launch/*.sh)

.DEFAULT_GOAL := help
.PHONY: help setup quickstart diffusion check test test-unit test-distributed test-long test-avx2 test-wheel \
	test-transformers test-vllm try-megatron test-faults soak mutations \
	fuzz audit gpu test-gpu test-te gpu-first gpu-pack bench-gpu bench-gpu-select bench-gpu-layer \
	bench-gpu-train study study-gpu \
	lint shellcheck format types constraints clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  PYTHON=/path/to/python with any of them chooses the interpreter."

setup: ## makes .venv with the tested set of packages (about 6 GB, once)
	@bash tools/setup.sh

quickstart: setup ## trains a small model on real text on this machine, about 5 minutes on 2 cores
	@PATH="$(CURDIR)/.venv/bin:$$PATH" bash examples/quickstart.sh

diffusion: setup ## trains a small model of images, about 10 minutes on 2 cores; IMAGES=folder
	@PATH="$(CURDIR)/.venv/bin:$$PATH" $(if $(IMAGES),IMAGES="$(IMAGES)") \
	  bash examples/diffusion/run.sh

# Without what takes long: Megatron, several processes, slow tests and Triton's interpreter.
check: setup lint types ## lint, types, and quick tests that need no Megatron: 4 minutes at most
	@$(TEST) tests -n 2 --dist loadgroup \
	  -m "not (megatron or distributed or long or slow or triton or hypothesis)"

test: setup lint types ## lint, types and every test that this machine can run and is not long
	@$(TEST) tests -n 2 --dist loadgroup -m "not long"

test-unit: setup ## the tests in one process
	@$(TEST) tests -m "not distributed and not long"

test-distributed: setup ## the tests that start several processes
	@$(TEST) tests -m "distributed and not long"

test-long: setup ## what make test leaves out, about 45 minutes; PART=tests/dry_run for a part
	@$(TEST) $(or $(PART),tests) -n 2 --dist loadgroup -m long

# What a processor without AVX-512 does, bf16 included, which is a hundred times slower there.
test-avx2: setup ## make test with the instructions of an older processor (AVX2)
	@ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
	  $(TEST) tests -n 2 --dist loadgroup -m "not long"

test-wheel: setup ## builds the wheel and walks through dynmoe from it, in an empty environment
	@bash tests/setup/wheel.sh

# Theirs are a package named tests, too, so it comes first on the path, and ours stays out of sight.
TRANSFORMERS = $(shell $(PYTHON_VENV) -c 'import importlib.metadata as m; print(m.version("transformers"))')
test-transformers: setup ## Transformers' common tests on the exported model; TESTS=its tests folder
	@test -f "$(TESTS)/causal_lm_tester.py" || { echo 'make test-transformers needs the tests of' \
	  "Transformers $(TRANSFORMERS), which its package does not have:"; \
	  echo "  git clone --depth 1 --branch v$(TRANSFORMERS)" \
	  "https://github.com/huggingface/transformers ../transformers"; \
	  echo '  make test-transformers TESTS=../transformers/tests'; exit 2; } >&2
	@HF_HUB_OFFLINE=1 PYTHONPATH="$(abspath $(TESTS))/..:$(CURDIR)" $(TEST) -c /dev/null \
	  --rootdir=tests/huggingface --noconftest --import-mode=importlib -p no:cacheprovider -W ignore \
	  -n 2 -q -rxX tests/huggingface/common_suite.py

# In an environment of its own, for vLLM needs another torch. Once it takes a network, and then none.
VLLM_ENV ?= .venv/vllm
test-vllm: setup ## vLLM serves exported models over HTTP and says what Transformers says; 6 GB, once
	@bash tests/setup/vllm.sh "$(VLLM_ENV)"
	@DYNMOE_VLLM="$(VLLM_ENV)" $(TEST) tests/vllm

# In a copy of its own: neither .venv nor the checkout that is named changes. docs/upstream_versions.md
try-megatron: setup ## this package on another Megatron: MEGATRON=checkout or version, PARTS="names settings"
	@$(PYTHON_VENV) tools/try_megatron.py $(or $(MEGATRON),$(error give MEGATRON=PATH_OR_VERSION)) \
	  $(if $(PARTS),--parts $(PARTS))

test-faults: setup ## kills, damaged checkpoints, full disks, signals: up to 25 minutes; KILLS=25
	@$(TEST) tests/faults --kills $(or $(KILLS),10)

soak: setup ## trains for 20 minutes and judges memory, files, step time and the count; MINUTES=60
	@OMP_NUM_THREADS=1 $(PYTHON_VENV) -m tests.faults.soak --minutes $(or $(MINUTES),20)

mutations: setup ## plants known mistakes in a copy, one by one: do tests catch them? half an hour
	@$(PYTHON_VENV) -m tests.mutations $(MUTATIONS)

fuzz: setup ## FUZZ=400 random command lines: each trains or is refused by name; MISTYPED=1
	@$(PYTHON_VENV) -m tests.fuzz --cases $(or $(FUZZ),400) $(if $(SEED),--seed $(SEED)) \
	  $(if $(MISTYPED),--mistyped)

# In an environment of its own: what audits is no part of what is audited. Needs a network.
audit: setup ## known vulnerabilities of the versions in constraints.txt
	@test -x .venv/audit/bin/pip-audit || { $(PYTHON_VENV) -m venv .venv/audit && \
	  .venv/audit/bin/pip install --quiet pip-audit; }
	@.venv/audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

# Without a device the tests would skip and the benchmarks take hours: neither may look like success.
gpu:
	@$(PYTHON_GPU) -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else \
	  "There is no CUDA device here, which this needs. On a CPU: make test, and docs/benchmarks.md.")'

# Not into benchmarks/results, which is OUTPUT where nothing is given.
gpu-first: ## the first minutes on a GPU; OUTPUT=dir MINUTES=8; DEVICE=cpu rehearses them
	@$(PYTHON_GPU) -m benchmarks.gpu_first $(if $(filter file,$(origin OUTPUT)),,--output "$(OUTPUT)") \
	  $(if $(MINUTES),--minutes $(MINUTES)) $(if $(filter cpu,$(DEVICE)),--rehearse) \
	  $(if $(ONLY),--only $(ONLY)) $(if $(STATE),--state "$(STATE)") $(if $(PACK),--pack "$(PACK)") \
	  $(if $(RESUME),--resume-from "$(RESUME)") $(if $(ANY_CODE),--any-code)

gpu-pack: setup ## what a GPU machine without a network lacks, to be brought there: build/gpu-pack
	@$(PYTHON_VENV) -m benchmarks.gpu_first.pack $(if $(PACKAGES),--packages $(PACKAGES))

# They set DYNMOE_KERNELS themselves, both ways. What only compiles, or is for CPUs, needs no GPU.
test-gpu: gpu ## the device's ways with kernels off and on, and the kernels natively
	@env -u DYNMOE_KERNELS OMP_NUM_THREADS=1 $(PYTHON_GPU) -m pytest tests/gpu tests/kernels \
	  --ignore tests/kernels/test_compiles.py --ignore-glob "tests/kernels/*_cpu.py"

# Where it is missing its double would run, which must not look like success either.
test-te: ## Transformer Engine's double against the original, and trainings on it; on a GPU
	@$(PYTHON_GPU) -m tests.doubles.on_cpu
	@env -u DYNMOE_KERNELS OMP_NUM_THREADS=1 $(PYTHON_GPU) -m pytest tests/doubles \
	  tests/distributed/test_transformer_engine.py

bench-gpu: bench-gpu-select bench-gpu-layer bench-gpu-train ## all three; OUTPUT=folder of the results

bench-gpu-select: gpu ## selection against stock Megatron, plain PyTorch and a copy of the same bytes
	@DYNMOE_KERNELS=1 $(BENCHMARK)/select_experts.py --seconds-budget 150 --output "$(OUTPUT)"
	@DYNMOE_KERNELS=1 $(BENCHMARK)/select_experts.py --seconds-budget 150 --output "$(OUTPUT)" \
	  --tokens 262144
	@$(PLOT)

bench-gpu-layer: gpu ## one MoE layer against stock Megatron's and a dense one
	@$(BENCHMARK)/layer.py --rounds 50 --seconds-budget 240 --output "$(OUTPUT)"
	@$(PLOT)

bench-gpu-train: gpu ## training steps of the paper's 3.5 B model, on one GPU of 141 GB
	@DYNMOE_KERNELS=1 $(BENCHMARK)/train_step.py --model paper --apart --backends torch_native \
	  --routings top_k dtop_p dtop_p@1.82 dense --settle 15 --rounds 12 --visits 3 \
	  --seconds-budget 440 --output "$(OUTPUT)"
	@$(PLOT)

study: setup ## the papers' claims in small, resumes; PART=rules or another of docs/study.md
	@$(PYTHON_VENV) -m study $(if $(PART),part $(PART)) $(STUDY)

study-gpu: ## the same with a larger model on one GPU; STUDY="--text FILE.jsonl.gz ..."
	@$(PYTHON_GPU) -m study --size gpu $(STUDY)

lint: setup ## ruff (rules and format), spelling, the order of imports, shellcheck
	@$(PYTHON_VENV) -m ruff check .
	@$(PYTHON_VENV) -m ruff format --check .
	@$(PYTHON_VENV) -m codespell_lib .
	@.venv/bin/lint-imports --no-logo
	@$(MAKE) --no-print-directory shellcheck

# A target of its own, which pre-commit calls, too.
shellcheck:
	@if command -v shellcheck >/dev/null; then shellcheck $(SCRIPTS); \
	else echo "shellcheck is not installed: the shell scripts are not checked"; fi

format: setup ## puts imports and layout right
	@$(PYTHON_VENV) -m ruff check --fix .
	@$(PYTHON_VENV) -m ruff format .

types: setup ## mypy on the whole package
	@$(PYTHON_VENV) -m mypy

constraints: setup ## writes what is installed in .venv to constraints.txt
	@{ sed '/^[^#]/,$$d' constraints.txt; \
	   $(PYTHON_VENV) -m pip freeze --all --exclude-editable | grep -vE '^(nvidia-|cuda-|triton==|pip==)'; \
	 } > constraints.new && mv constraints.new constraints.txt

clean: ## removes caches and build files; .venv and runs/ stay
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
