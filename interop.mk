# The interop suite: the programs that quantkit writes for read what it wrote, on the CPU.
# Environments of their own, because vLLM pins older versions than the newest transformers, and
# GPTQModel brings much that only it needs.

INTEROP := .interop
# QUANTKIT_INTEROP_MODEL=DIR reads what is made of another llama than the embedded demo model.
QUANTKIT_INTEROP_MODEL ?=
CHECKPOINTS := $(INTEROP)/checkpoints$(if $(QUANTKIT_INTEROP_MODEL),-$(notdir $(QUANTKIT_INTEROP_MODEL:/=)))
INTEROP_PYTEST := -m pytest -c tests/interop/pytest.ini --checkpoints $(CHECKPOINTS)

READERS := transformers gptqmodel vllm modelopt llama onnx tasks
.PHONY: interop interop-environments interop-checkpoints interop-launchers $(READERS:%=interop-%)

interop: $(READERS:%=interop-%) interop-launchers

interop-environments: $(READERS:%=$(INTEROP)/%/.installed)

# The environments need quantkit's own only to write the checkpoints.
interop-checkpoints: $(VENV)/.installed
	$(VENV)/bin/python tests/interop/make_checkpoints.py $(CHECKPOINTS) $(QUANTKIT_INTEROP_MODEL)

# -P keeps the working directory, with its folders `kernels` and `eval`, off sys.path.
interop-transformers: $(INTEROP)/transformers/.installed interop-checkpoints
	$(INTEROP)/transformers/bin/python -P $(INTEROP_PYTEST) \
		tests/interop/test_compressed_tensors.py tests/interop/test_transformers.py \
		tests/interop/test_bitsandbytes.py tests/interop/test_sentence_transformers.py

interop-gptqmodel: $(INTEROP)/gptqmodel/.installed interop-checkpoints
	$(INTEROP)/gptqmodel/bin/python -P $(INTEROP_PYTEST) tests/interop/test_gptqmodel.py

interop-vllm: $(INTEROP)/vllm/.installed interop-checkpoints
	$(INTEROP)/vllm/bin/python -P $(INTEROP_PYTEST) -rP tests/interop/test_vllm.py \
		tests/interop/test_vllm_modelopt.py

# Both read each other in one process; the demo model is all it needs.
interop-modelopt: $(INTEROP)/modelopt/.installed
	PYTHONPATH=$(CURDIR):$(CURDIR)/kernels:$(CURDIR)/eval $(INTEROP)/modelopt/bin/python -P \
		$(INTEROP_PYTEST) tests/interop/test_modelopt.py

# The export itself needs the model builder, so quantkit's sources are on the path here.
interop-onnx: $(INTEROP)/onnx/.installed interop-checkpoints
	PYTHONPATH=$(CURDIR):$(CURDIR)/kernels:$(CURDIR)/eval $(INTEROP)/onnx/bin/python -P \
		$(INTEROP_PYTEST) -rP tests/interop/test_onnxruntime.py

# lm-evaluation-harness needs forty packages that nothing else here does.  Imported first, because
# the tests skip where it is missing.
interop-tasks: $(INTEROP)/tasks/.installed
	PYTHONPATH=$(CURDIR):$(CURDIR)/kernels:$(CURDIR)/eval $(INTEROP)/tasks/bin/python -P \
		-c "import lm_eval"
	PYTHONPATH=$(CURDIR):$(CURDIR)/kernels:$(CURDIR)/eval OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 \
		$(INTEROP)/tasks/bin/python -P -m pytest tests/evaluation/test_harness.py

# torch brings its own dependencies; the rest is pinned whole, so that nothing can replace it.
# Compiling all of vLLM's packages to bytecode takes longer than compiling those that run.
$(INTEROP)/%/.installed: constraints-interop-%.txt
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q -c $< torch
	$(@D)/bin/python -m pip install -q --no-compile --no-deps -r $<
	touch $@

# Several processes, started as people start them: each imports everything; and what transformers
# serves with over quantkit's own layers.
interop-launchers: $(VENV)/.installed
	$(VENV)/bin/python -P $(INTEROP_PYTEST) tests/interop/test_launchers.py \
		tests/interop/test_serving.py

# llama.cpp is compiled when llama-cpp-python is installed: cmake and a C++ compiler are needed.
interop-llama: $(INTEROP)/llama/.installed $(VENV)/.installed
	$(VENV)/bin/python tests/interop/make_gguf.py $(CHECKPOINTS) $(QUANTKIT_INTEROP_MODEL)
	$(INTEROP)/llama/bin/python -P $(INTEROP_PYTEST) -rP tests/interop/test_llama_cpp.py
	QUANTKIT_LLAMA_PYTHON=$(CURDIR)/$(INTEROP)/llama/bin/python $(VENV)/bin/python -P \
		$(INTEROP_PYTEST) -rP tests/interop/test_verify_llama_cpp.py

# Without the parts that nobody here uses; -O1 for C++ halves the time (the kernels are C, -O3).
$(INTEROP)/llama/.installed: constraints-interop-llama.txt
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DCMAKE_CXX_FLAGS_RELEASE=-O1" \
		$(@D)/bin/python -m pip install -q -r $<
	touch $@
