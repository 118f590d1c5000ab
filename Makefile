# PYTHON names the interpreter of the environment the project is installed in: make test PYTHON=.venv/bin/python
PYTHON ?= python3

.PHONY: help run smollm2 test slow real engines check fix gpu bench docs reproduce notebook release

help:
	@echo "make run    evaluate the embedded model, original and fused"
	@echo "make reproduce MODEL=Qwen/Qwen2.5-3B   collect, fit, bake, verify, evaluate; one bundle"
	@echo "make smollm2   fetch SmolLM2-135M-Instruct, a real model, for --model smollm2"
	@echo "make test   the everyday tests, in two minutes"
	@echo "make slow   the other tests; CI runs both"
	@echo "make real   the tests on SmolLM2"
	@echo "make engines  vLLM and lm-evaluation-harness: builds .venv-engines (3.5 GB) and runs their tests there"
	@echo "make check  ruff, mypy, the import order and the packaging: a minute"
	@echo "make fix    apply ruff's automatic fixes"
	@echo "make docs   the documentation as a site, in site/, with every link checked; make docs SERVE=1 shows it"
	@echo "make notebook  run examples/first_steps.ipynb and store its outputs: a minute"
	@echo "make release  build the wheel and the source distribution from the last commit, test both, print the notes"
	@echo "make gpu    the tests and measurements that need a CUDA GPU; make gpu PARTS=compiled some of them;"
	@echo "            make gpu DRY=1 runs each part up to its first use of the GPU, on any machine"
	@echo "make bench  the list of benchmarks; make bench NAME=opcount runs one"

run:
	$(PYTHON) -m kernel_surgery.eval --mode fused

reproduce:
	$(PYTHON) -m kernel_surgery.reproduce --model $(or $(MODEL),polyglot) --out $(or $(OUT),results/reproduce) --controls haar:20

smollm2:
	$(PYTHON) -m kernel_surgery.dequantize smollm2

test:
	$(PYTHON) -m pytest

slow:
	$(PYTHON) -m pytest -m slow

real: smollm2
	$(PYTHON) -m pytest -m real

engines: smollm2
	PYTHON=$(PYTHON) tests/engines/environment.sh $(if $(UPDATE),update,test)

check:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest -q tests/test_imports.py tests/test_packaging.py

fix:
	$(PYTHON) -m ruff check --fix .

docs:
	$(PYTHON) -m bench.site $(if $(SERVE),--serve)

notebook:
	$(PYTHON) -m tests.test_notebook --update

release:
	$(PYTHON) -m tests.release

gpu:
	$(PYTHON) -m bench.gpu $(if $(PARTS),--parts $(PARTS)) $(if $(DRY),--dry)

bench:
	$(PYTHON) -m bench $(NAME)
