"""From the hidden states of a text to its vector, as the files beside an embedding model say.

Those are sentence-transformers' (modules.json, and a folder for each module after the model),
read as its 6.2 reads them.  B texts of T tokens each, H hidden size, E size of the vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from quantkit.checkpoint.door import TOKENIZER_BYTES, parse_json, read_plain
from quantkit.checkpoint.sidefiles import MODULES
from quantkit.checkpoint.source import Source
from quantkit_eval.errors import EvaluationError

_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS: dict[str, nn.Module] = {
    "Identity": nn.Identity(),
    "Tanh": nn.Tanh(),
    "ReLU": nn.ReLU(),
    "GELU": nn.GELU(),
    "SiLU": nn.SiLU(),
}


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A layer after pooling: activation(x @ weight_OI.T + bias_O)."""

    weight_OI: Tensor
    bias_O: Tensor | None
    activation: str

    def __call__(self, x_BI: Tensor) -> Tensor:
        """[B, O], float32."""
        y_BO = nn.functional.linear(x_BI, self.weight_OI, self.bias_O)
        found: Tensor = _ACTIVATIONS[self.activation](y_BO)
        return found


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """How a text becomes a vector.

    modes        of `_MODES`; the vectors of several lie one behind the other
    prompt       stands before every text
    max_tokens   what is read of a text, special tokens included; None: what the model has
    said         whether files beside the model say so, or it was taken for want of them
    """

    modes: tuple[str, ...]
    dense: tuple[Dense, ...] = ()
    prompt: str = ""
    max_tokens: int | None = None
    lower: bool = False
    said: bool = True

    def __call__(self, hidden_BTH: Tensor) -> Tensor:
        """Vectors [B, E] of length 1, float32, from texts of one length without padding."""
        states = hidden_BTH.float()
        tokens = states.shape[1]
        parts: dict[str, Tensor] = {}
        mean = states.mean(1)
        weights_T = torch.arange(1, tokens + 1, dtype=torch.float32, device=states.device)
        for mode in self.modes:
            if mode == "cls":
                parts[mode] = states[:, 0]
            elif mode == "lasttoken":
                parts[mode] = states[:, -1]
            elif mode == "max":
                parts[mode] = states.amax(1)
            elif mode == "weightedmean":
                parts[mode] = torch.einsum("bth,t->bh", states, weights_T / weights_T.sum())
            else:
                parts[mode] = mean if mode == "mean" else mean * tokens**0.5
        vectors = torch.cat([parts[mode] for mode in self.modes], dim=-1)
        for layer in self.dense:
            vectors = layer(vectors)
        return nn.functional.normalize(vectors, dim=-1)

    def described(self) -> str:
        """For reports: what is taken, and whether somebody said so."""
        parts = [" + ".join(self.modes)]
        parts += [f"a dense layer to {len(layer.weight_OI)}" for layer in self.dense]
        told = "by modules.json" if self.said else "assumed: no modules.json says it"
        return f"{', then '.join(parts)}, length 1 ({told})"


def read_pooling(source: Source, *, causal: bool) -> Pooling:
    """What the files beside a model say; without modules.json the usual for its kind.

    That is the last token for models whose tokens see those before them only (`causal`), else the
    mean of all.  Raises EvaluationError for a module that is not known here.
    """
    files = source.side_files()
    if MODULES not in files:
        return Pooling(modes=("lasttoken" if causal else "mean",), said=False)
    # The door knows objects only.
    whole = b'{"modules": ' + _bytes(files[MODULES]) + b"}"
    listed = parse_json(whole, MODULES, error=EvaluationError)["modules"]
    if not isinstance(listed, list) or not all(isinstance(entry, Mapping) for entry in listed):
        raise EvaluationError(f"{MODULES}: a list of modules is needed")
    modes: tuple[str, ...] = ()
    dense: list[Dense] = []
    for entry in listed:
        kind = str(entry.get("type", "")).rpartition(".")[2]
        folder = str(entry.get("path", ""))
        if kind == "Transformer" and not folder:
            continue
        if kind == "Pooling" and not modes:
            modes = _modes(_object(files, f"{folder}/config.json"), folder)
        elif kind == "Dense" and modes:
            dense.append(_dense(files, folder))
        elif kind != "Normalize":
            raise EvaluationError(
                f"{MODULES}: a module {kind!r} in {folder!r}; known are Transformer in the model's "
                "own folder, then Pooling, Dense and Normalize"
            )
    if not modes:
        raise EvaluationError(f"{MODULES}: has no Pooling, so texts get no vectors")
    told = _object(files, "config_sentence_transformers.json", needed=False)
    limits = _object(files, "sentence_bert_config.json", needed=False)
    longest = limits.get("max_seq_length")
    return Pooling(
        modes=modes,
        dense=tuple(dense),
        prompt=_prompt(told),
        max_tokens=longest if isinstance(longest, int) and longest > 0 else None,
        lower=limits.get("do_lower_case") is True,
    )


def _modes(config: Mapping[str, Any], folder: str) -> tuple[str, ...]:
    found = config.get("pooling_mode")
    if found is None:
        found = [mode for flag, mode in _FLAGS.items() if config.get(flag) is True] or ["mean"]
    modes = tuple([found] if isinstance(found, str) else found)
    for mode in modes:
        if mode not in _MODES:
            raise EvaluationError(
                f"{folder}/config.json: pooling mode {mode!r}; known: {', '.join(_MODES)}"
            )
    if config.get("include_prompt") is False:
        raise EvaluationError(
            f"{folder}/config.json: include_prompt false, which leaves a prompt's tokens out of "
            "the vector, is not known here"
        )
    return modes


def _dense(files: Mapping[str, Path | bytes], folder: str) -> Dense:
    config = _object(files, f"{folder}/config.json")
    activation = str(config.get("activation_function", "Tanh")).rpartition(".")[2]
    if activation not in _ACTIVATIONS or config.get("use_residual"):
        what = "use_residual" if config.get("use_residual") else f"activation {activation!r}"
        raise EvaluationError(
            f"{folder}/config.json: {what} is not known here; activations are "
            f"{', '.join(_ACTIVATIONS)}"
        )
    name = f"{folder}/model.safetensors"
    if name not in files:
        raise EvaluationError(f"{name}: is missing, and {MODULES} names its folder")
    try:
        tensors = load_tensors(_bytes(files[name]))
        weight, bias = tensors["linear.weight"].float(), tensors.get("linear.bias")
    # safetensors raises a class of its own for a damaged file.
    except Exception as error:
        raise EvaluationError(f"{name}: holds no dense layer ({error})") from error
    return Dense(
        weight_OI=weight, bias_O=None if bias is None else bias.float(), activation=activation
    )


def _prompt(told: Mapping[str, Any]) -> str:
    prompts, name = told.get("prompts"), told.get("default_prompt_name")
    found = prompts.get(name) if isinstance(prompts, Mapping) and isinstance(name, str) else None
    return found if isinstance(found, str) else ""


def _object(
    files: Mapping[str, Path | bytes], name: str, *, needed: bool = True
) -> Mapping[str, Any]:
    if name not in files:
        if needed:
            raise EvaluationError(f"{name}: is missing, and {MODULES} names its folder")
        return {}
    return parse_json(_bytes(files[name]), name, wide=True, error=EvaluationError)


def _bytes(content: Path | bytes) -> bytes:
    return content if isinstance(content, bytes) else read_plain(content, largest=TOKENIZER_BYTES)
