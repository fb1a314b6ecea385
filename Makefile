# make demo   set everything up and run the main job on synthetic CT
# make test   set everything up and run all tests
# make lint, make format, make bench, make sanitize, make test-avx512, make fuzz, make fuzz-files, make soak,
# make test-installs, make test-nnunet, make gpu-check, make clean

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo
# Threads that native builds may use.
export MAX_JOBS ?= $(shell nproc)

.PHONY: demo host-cuda test test-ops test-avx512 test-nnunet test-installs install lint format bench gpu-check sanitize fuzz fuzz-files soak clean

# Build tools come first: the package is built against the torch in the environment, not in an isolated one.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.tools: constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt torch torchvision numpy
	$(BIN)/python -m pip install -q -c constraints.txt "cmake>=3.24" ninja pybind11 "setuptools>=77" wheel
	@touch $@

$(VENV)/.installed: $(VENV)/.tools pyproject.toml
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[train,test,dev]"
	@touch $@

install: $(VENV)/.installed
	@# Incremental: recompiles only what has changed since.
	$(BIN)/python setup.py -q build_ext --inplace > build/build.log 2>&1 || (cat build/build.log; exit 1)
	@$(BIN)/python -c "import pgl_ops; b = pgl_ops.build_info(); print('pgl_ops', b['version'], '| CUDA kernels:', b['cuda'] or 'none (no nvcc found at build time)')"

demo: install
	$(BIN)/python examples/demo.py --output $(DEMO)

# The CUDA sources compiled for the host, before any test waits for them.
host-cuda: install
	$(BIN)/python -m tests.ops.host_cuda

# Two processes with a thread each: the tests that are about threads set their number themselves. UTF-8 whatever
# a library makes of the locale of the process that runs the tests.
test: host-cuda
	PYTHONUTF8=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

test-ops: host-cuda
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/ops

# nnU-Net's own functions on exported weights, in an environment of its own.
NNUNET_VENV ?= build/venv-nnunet
test-nnunet:
	PYTHON=$(PYTHON) bash tests/nnunet.sh $(NNUNET_VENV)

NATIVE := 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.inl' 'csrc/*.cu' 'csrc/*.cuh'

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files $(NATIVE))
	$(BIN)/mypy pgl_ops pgl

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files $(NATIVE))

# The ops against their peers, small problems against the reference, and a training step against its networks.
bench: install
	$(BIN)/python -m benchmarks.ops
	$(BIN)/python -m benchmarks.sweep
	$(BIN)/python -m benchmarks.pretrain

# On a machine with a GPU, nvcc and torch; needs no network. See docs/gpu-validation.md.
gpu-check:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_check

# The op tests on kernels built with AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: install
	bash tests/sanitize.sh $(BIN)/python

# The op tests on the AVX-512 kernels, in plain loops where the processor has no AVX-512.
test-avx512: install
	bash tests/avx512.sh $(BIN)/python

# The fuzzer under the sanitizers, on every set of kernels; a new seed each time.
fuzz: install
	bash tests/sanitize.sh $(BIN)/python --fuzz $(or $(FUZZ_CASES),20000)

# An hour of pretraining that must stay as it was in its first minutes. See docs/reliability.md.
soak: install
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak --seconds $(or $(SECONDS),3600)

# Wheel and sdist in clean environments, PYTHON=TORCH,TORCHVISION each; the folder must not exist yet.
INSTALLS ?= build/installs
test-installs: install
	BUILDER=$(BIN)/python bash tests/installs.sh $(INSTALLS) $(ENVIRONMENTS)

# Real image files (at ../shared/data), damaged at random, given to the readers; a new seed each time.
fuzz-files: install
	PYTHONUTF8=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz_files --cases $(or $(FUZZ_CASES),2000)

clean:
	rm -rf build dist *.egg-info pgl_ops/*.so $(VENV)/.installed
