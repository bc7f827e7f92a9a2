# Every target sets up .venv by itself: wheels pinned in requirements.lock, then this folder as an editable package.
# PYTHON is the interpreter that makes .venv: 3.11 to 3.13 (requirements.lock was made on 3.11).
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

.PHONY: demo test test-slow test-slurm lint bench bench-gpu
.DELETE_ON_ERROR:

demo: .venv/.ready
	$(BIN)/python -m harness run --methods beit,mae --evals ade20k,coco

# Two processes of one thread, a file whole in one of them: half the time on two cores, and no more memory than a laptop has. In the order of their names:
# by default the files with the fewest tests come last, and these have the longest ones.
test: .venv/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not slurm"

test-slow: .venv/.ready
	$(BIN)/python -m pytest -m slow

# A real SLURM on this machine; as root, after: apt-get install slurm-wlm munge. ONLY="preempted or lost_node" (as .ci/run has it) chooses tests by name;
# where no SLURM can run they are skipped with the reason.
test-slurm: .venv/.ready
	$(BIN)/python -m pytest -m slurm -rs tests/slurm $(if $(ONLY),-k "$(ONLY)")

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/mypy --strict harness
	$(BIN)/lint-imports

# Each benchmark states its rival in its docstring and prints its own lines.
bench: .venv/.ready
	@found=; for script in $(filter-out benchmarks/gpu.py benchmarks/report.py,$(wildcard benchmarks/*.py)); do \
		[ -e "$$script" ] || continue; found=yes; echo "== $$script" >&2; $(BIN)/python "$$script" || exit 1; \
	done; [ -n "$$found" ] || echo "no benchmarks yet: benchmarks/*.py" >&2

# On a machine with a GPU, which may have no network: GPU_PYTHON is one with a CUDA build of torch, torchvision and timm; nothing is installed.
GPU_PYTHON ?= python3
bench-gpu:
	PYTHONPATH=. $(GPU_PYTHON) benchmarks/gpu.py --out benchmarks/results

# --no-deps: the lock is complete, and it holds opencv-python-headless where mmcv-lite and mmengine ask for opencv-python, which
# needs libGL and GLib from the system. A changed lock updates .venv in place; `rm -r .venv` starts afresh.
.venv/.locked: requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else f"$(PYTHON) is Python {v[0]}.{v[1]}: run make PYTHON=python3.11 (3.11 to 3.13 work)")'
	@echo "setting up .venv from requirements.lock (about 5.5 GB, a few minutes)" >&2
	$(PYTHON) -m venv .venv
	$(PIP) install --no-deps -r requirements.lock
	@touch $@

.venv/.ready: .venv/.locked pyproject.toml
	$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@
