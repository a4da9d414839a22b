# Everything from a clean clone: Python 3.11 and pip are enough. `make demo` and `make test` do their own set-up.
VENV := .venv
PYTHON := $(VENV)/bin/python

.PHONY: demo test slow lint docs faults lowest newest bench clean

demo: $(VENV)/.installed
	$(VENV)/bin/latentprep demo demo
	@echo "         (in this clone: $(VENV)/bin/latentprep inspect demo/cache)"

test: $(VENV)/.installed-test
	$(PYTHON) -m pytest -n 2 -m "not slow"

# the tests that take longest: the wheel, kills and signals, true architectures, compilers
slow: $(VENV)/.installed-test
	$(PYTHON) -m pytest -n 2 -m "$(or $(MARK),slow)" $(TESTS)

lint: $(VENV)/.installed-lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# the site, into site/; fails if a link leads nowhere. The variable keeps an advertisement out
docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

# the tests that kill and mutate at random, at greater length: a quarter of an hour
faults: $(VENV)/.installed-test
	LATENTPREP_KILLS=200 LATENTPREP_FUZZ=10 $(PYTHON) -m pytest -n 2 tests/test_faults.py tests/test_kills.py tests/test_fuzz.py tests/test_combinations.py

# the tests with the lowest versions that pyproject.toml allows, all together; torch alone as in constraints.txt
lowest: .venv-lowest/.installed
	.venv-lowest/bin/python -m pytest -n 2 -m "not slow" $(TESTS)

# some of the tests with the newest Python of this machine; says what is not there
newest:
	.ci/newest

# docs/measured.md, by all scripts of benchmarks/ (ONLY=decode,read: by those alone, and the rows of the others stay)
bench: $(VENV)/.installed-test
	$(PYTHON) benchmarks/measure.py --only "$(ONLY)"

clean:
	rm -rf $(VENV) .venv-docs .venv-lowest .venv-newest demo dist build site

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

.venv-lowest/.installed: pyproject.toml constraints.txt
	python3 -m venv .venv-lowest
	.venv-lowest/bin/python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
		asked = p['dependencies'] + p['optional-dependencies']['test']; \
		print(*(line.replace('>=', '==') for line in asked if not line.startswith('torch>')), sep='\n')" > .venv-lowest/lowest.txt
	sed -n '/^torch==/p' constraints.txt >> .venv-lowest/lowest.txt
	.venv-lowest/bin/pip install --disable-pip-version-check -q -c .venv-lowest/lowest.txt -e ".[test]"
	@touch $@

# the extra `docs` alone, which needs no torch: seconds
.venv-docs/.installed: pyproject.toml constraints.txt
	python3 -m venv .venv-docs
	.venv-docs/bin/python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
		print(*p['optional-dependencies']['docs'], sep='\n')" > .venv-docs/asked.txt
	.venv-docs/bin/pip install --disable-pip-version-check -q -c constraints.txt -r .venv-docs/asked.txt
	@touch $@
