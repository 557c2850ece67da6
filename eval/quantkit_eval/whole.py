"""What needs a whole model in memory: completions side by side, and lm-eval's tasks.

One model at a time, as it would be used: in the original's dtype, through the chosen kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quantkit.checkpoint.memory import current_rss, format_size, release_free_memory
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.errors import BudgetError
from quantkit.inference.load import load
from quantkit_eval.records import Completion
from quantkit_eval.setting import EvaluationRequest, Setting
from quantkit_eval.tasks.completions import continue_prompts, draw_prompts
from quantkit_eval.tasks.harness import LogLine, ask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Copies of the weights in bytes that loading one model takes at its peak, and room to run it.
_LOAD_FACTOR, _RUN_BYTES = 1.3, 256 * 2**20
# Questions that lm-eval asks at once, and the longest prompts that memory is reckoned for.
_BATCH, _CONTEXT = 8, 2048
_DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Whole:
    """What whole models gave, the original first: continuations of the prompts, lm-eval's logs.

    note   why there are no continuations, or None
    """

    prompts: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    logs: tuple[tuple[LogLine, ...], ...]
    note: str | None

    def completions(self, number: int) -> tuple[Completion, ...]:
        """The continuations of quantized model `number` beside the original's."""
        if not self.texts:
            return ()
        return tuple(
            Completion(prompt=prompt, original=one, quantized=other)
            for prompt, one, other in zip(
                self.prompts, self.texts[0], self.texts[number + 1], strict=True
            )
        )


def check_whole(request: EvaluationRequest, setting: Setting) -> None:
    """Raises BudgetError, before anything runs, if lm-eval's tasks do not fit in --max-ram."""
    if not setting.harness or request.max_ram is None:
        return
    needed = _needed(request, setting)
    if needed > request.max_ram:
        raise BudgetError(
            f"--max-ram {format_size(request.max_ram)} is too small for lm-eval's tasks: they need "
            f"a whole model in memory, about {format_size(needed)}; give that much, or leave the "
            "lm-eval tasks out of --tasks"
        )


def run_whole(request: EvaluationRequest, setting: Setting) -> Whole:
    """Completions and lm-eval's answers of all models; completions give way to --max-ram."""
    note = None
    drawn = draw_prompts(request, setting)
    if drawn and request.max_ram is not None:
        needed = _needed(request, setting)
        if needed > request.max_ram:
            drawn = []
            note = (
                f"Writing text needs a whole model in memory, about {format_size(needed)}; "
                f"--max-ram is {format_size(request.max_ram)}."
            )
    texts, logs = [], []
    if drawn or setting.harness:
        for path in (request.model, *request.quantized):
            model = _load(path, request, setting)
            if drawn and not model.can_generate():
                drawn = []
                note = f"{type(model).__name__} has no generate, by which text is written."
            texts.append(tuple(continue_prompts(model, drawn, setting.tokenizer)))
            # lm-eval may give the tokenizer a padding token, and changes the model's config.
            tokenizer = load_tokenizer(
                setting.original.source, trust_remote_code=request.trust_remote_code
            )
            if setting.harness:
                logs.append(
                    ask(
                        model,
                        tokenizer,
                        setting.harness,
                        limit=request.task_questions,
                        batch_size=_batch(request),
                    )
                )
            del model
            release_free_memory()
    return Whole(
        prompts=tuple(
            setting.tokenizer.decode(prompt["input_ids"][0], skip_special_tokens=True)
            for prompt in drawn
        ),
        texts=tuple(texts) if drawn else (),
        logs=tuple(logs),
        note=note,
    )


def whole_dtype(setting: Setting) -> torch.dtype:
    """What whole models compute in: the original's own dtype if it is one to compute in."""
    return _DTYPES.get(setting.original.identity.dtype, torch.bfloat16)


def _load(path: str, request: EvaluationRequest, setting: Setting) -> PreTrainedModel:
    return load(
        Path(path) if Path(path).is_dir() else path,
        dtype=whole_dtype(setting),
        device=request.device,
        backend=request.backend,
        trust_remote_code=request.trust_remote_code,
    )


def _batch(request: EvaluationRequest) -> int:
    # Logits of long prompts are large: under a budget one question at a time.
    return _BATCH if request.max_ram is None else 1


def _needed(request: EvaluationRequest, setting: Setting) -> int:
    source = setting.original.source
    count = sum(source.info(name).numel for name in source.names())
    weights = int(_LOAD_FACTOR * count * whole_dtype(setting).itemsize)
    logits = 0
    if setting.harness:
        # lm-eval's log-softmax over all positions, float32, and the logits that it is of.
        tokens = _batch(request) * min(_CONTEXT, setting.positions or _CONTEXT)
        logits = 2 * 4 * tokens * len(setting.tokenizer)
    return current_rss() + weights + logits + _RUN_BYTES
