# The interop suite: the programs that quantkit writes for read what it wrote, on the CPU.
# Environments of their own, because vLLM pins older versions than the newest transformers, and
# GPTQModel brings much that only it needs.

INTEROP := .interop
INTEROP_PYTEST := -m pytest -c tests/interop/pytest.ini --checkpoints $(INTEROP)/checkpoints

.PHONY: interop interop-checkpoints interop-transformers interop-gptqmodel interop-vllm

interop: interop-transformers interop-gptqmodel interop-vllm

# The environments need quantkit's own only to write the checkpoints.
interop-checkpoints: $(VENV)/.installed
	$(VENV)/bin/python tests/interop/make_checkpoints.py $(INTEROP)/checkpoints

# -P keeps the working directory, with its folders `kernels` and `eval`, off sys.path.
interop-transformers: $(INTEROP)/transformers/.installed interop-checkpoints
	$(INTEROP)/transformers/bin/python -P $(INTEROP_PYTEST) \
		tests/interop/test_transformers.py tests/interop/test_bitsandbytes.py

interop-gptqmodel: $(INTEROP)/gptqmodel/.installed interop-checkpoints
	$(INTEROP)/gptqmodel/bin/python -P $(INTEROP_PYTEST) tests/interop/test_gptqmodel.py

interop-vllm: $(INTEROP)/vllm/.installed interop-checkpoints
	$(INTEROP)/vllm/bin/python -P $(INTEROP_PYTEST) -rP tests/interop/test_vllm.py

# torch brings its own dependencies; the rest is pinned whole, so that nothing can replace it.
# Compiling all of vLLM's packages to bytecode takes longer than compiling those that run.
$(INTEROP)/%/.installed: constraints-interop-%.txt
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q -c $< torch
	$(@D)/bin/python -m pip install -q --no-compile --no-deps -r $<
	touch $@
