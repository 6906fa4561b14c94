# make demo   prepare, test, train and show a small example          make test   lint and tests
# Both set up .venv first if need be; the second call installs nothing.

VENV ?= .venv
BIN := $(VENV)/bin
# torch and torchvision, as pip is asked for them. CPU only, smaller: make TORCH='--index-url https://download.pytorch.org/whl/cpu torch torchvision'
TORCH ?= torch torchvision
INSTALLED := $(VENV)/.installed

.PHONY: install demo test lint clean

demo: install
	$(BIN)/ppsr demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: $(INSTALLED)

# torch first, then what basicsr's setup imports, then basicsr in the same environment (its setup wants torch, numpy and
# cython at build time), then this package.
$(INSTALLED): setup.py pyproject.toml $(wildcard ppsr/ops/native/*.c ppsr/ops/native/*.h)
	@if [ ! -x $(BIN)/python ]; then \
		for p in $(PYTHON) python3.11 python3.12 python3.10 python3; do \
			if $$p -c 'import sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then \
				echo "Making $(VENV) with $$($$p --version)"; exec $$p -m venv $(VENV); \
			fi; \
		done; \
		echo "ppsr needs Python 3.10, 3.11 or 3.12 with venv; install one, or name it: make PYTHON=/path/to/python3.11" >&2; \
		exit 2; \
	fi
	$(BIN)/python -m pip install -q 'pip>=23' 'setuptools>=70.1' wheel cython numpy
	$(BIN)/python -c 'import torch, torchvision' 2>/dev/null || $(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q --no-build-isolation basicsr==1.4.2
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
