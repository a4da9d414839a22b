# Everything from a clean clone: Python 3.11 and pip are enough. `make demo` and `make test` do their own set-up.
VENV := .venv
PYTHON := $(VENV)/bin/python

.PHONY: demo test slow lint faults lowest bench clean

demo: $(VENV)/.installed
	$(VENV)/bin/latentprep demo demo
	@echo "         (in this clone: $(VENV)/bin/latentprep inspect demo/cache)"

test: $(VENV)/.installed-test
	$(PYTHON) -m pytest -n 2 -m "not slow"

# the tests that take longest: the wheel, kills and signals, true architectures, compilers
slow: $(VENV)/.installed-test
	$(PYTHON) -m pytest -n 2 -m slow

lint: $(VENV)/.installed-lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# the tests that kill and mutate at random, at greater length: a quarter of an hour
faults: $(VENV)/.installed-test
	LATENTPREP_KILLS=200 LATENTPREP_FUZZ=10 $(PYTHON) -m pytest -n 2 tests/test_faults.py tests/test_fuzz.py tests/test_combinations.py

# model folders under the lowest versions that pyproject.toml allows of what reads them; torch as in constraints.txt
lowest:
	python3 -m venv .venv-lowest
	.venv-lowest/bin/pip install --disable-pip-version-check -q "torch==$$(sed -n 's/^torch==//p' constraints.txt)" \
		diffusers==0.33.0 transformers==4.44.0 safetensors==0.4.3 huggingface-hub==0.34.0 numpy==1.26.4 pillow==11.0.0 \
		typer==0.16.0 rich==13.0.0 tqdm==4.66.0 filelock==3.13.0 fsspec==2024.2.0 pytest scikit-image scikit-learn
	.venv-lowest/bin/python -m pytest -m "not slow" tests/test_hostile_models.py tests/test_normalization.py \
		tests/test_single_file.py tests/test_models.py

bench: $(VENV)/.installed-test
	$(PYTHON) benchmarks/read.py
	$(PYTHON) benchmarks/scale.py
	$(PYTHON) benchmarks/decode.py
	$(PYTHON) benchmarks/encode.py
	$(PYTHON) benchmarks/precision.py
	$(PYTHON) benchmarks/memory.py
	$(PYTHON) benchmarks/pillow_samples.py

clean:
	rm -rf $(VENV) .venv-lowest demo dist build

$(VENV)/bin/python:
	python3 -m venv $(VENV)

# the exact versions of constraints.txt: torch in its CPU build, and no surprises
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PYTHON) -m pip install --disable-pip-version-check -q -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PYTHON) -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[test]"
	@touch $@

$(VENV)/.installed-lint: $(VENV)/.installed-test
	$(PYTHON) -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[test,lint]"
	@touch $@
