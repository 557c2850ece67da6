"""docs/models.md from the findings of a sweep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_KINDS = {
    "causal": "Causal language models",
    "image": "Image-text models",
    "encoder": "Encoders (masked language models)",
    "embedding": "Embedding models (without a head)",
    "reranker": "Rerankers (sequence classification)",
}
_HEAD = """\
# Models

Every model type of transformers {transformers}, made tiny and tried by `make sweep`
([models.json](../eval/results/models.json)): saved, quantized by `rtn` and by `best` under their
default schemes, loaded by `quantkit.load`, and compared with what transformers makes of the
decoded weights in float32. *Works* means that the logits are equal, that saving the loaded model
gives the same tensors, and that at least 80 % of the matrices in blocks that a pass over text
multiplies by are quantized. Tiny models say nothing about speed or accuracy, and nothing about
vLLM.

There are no tables of architectures in quantkit: blocks, shared inputs and scales that can be
folded are found by running the model. What is refused is refused before anything is written, with
exit code 2.

| | types that run | work | refused | |
|---|---|---|---|---|
{totals}
"""


def page(result: Mapping[str, Any]) -> str:
    """The page; `result` is what the tool writes to models.json."""
    findings = result["findings"]
    rows = [_total(kind, title, findings) for kind, title in _KINDS.items()]
    parts = [
        _HEAD.format(
            transformers=result["versions"]["transformers"], totals="\n".join(filter(None, rows))
        )
    ]
    for kind, title in _KINDS.items():
        mine = [found for found in findings if found["kind"] == kind]
        if mine:
            parts.append(_section(title, mine))
    return "\n".join(parts)


def _total(kind: str, title: str, findings: Sequence[Mapping[str, Any]]) -> str | None:
    mine = [found["status"] for found in findings if found["kind"] == kind]
    runs = [status for status in mine if status != "not runnable"]
    if not runs:
        return None
    works, refused = runs.count("works"), runs.count("refused")
    wrong = len(runs) - works - refused
    told = f"{wrong} wrong" if wrong else ""
    return f"| {title} | {len(runs)} | {works} ({works / len(runs):.1%}) | {refused} | {told} |"


def _section(title: str, findings: Iterable[Mapping[str, Any]]) -> str:
    by_status: dict[str, list[Mapping[str, Any]]] = {}
    for found in findings:
        by_status.setdefault(found["status"], []).append(found)
    lines = [f"## {title}", ""]
    works = [f"`{found['model_type']}`" for found in by_status.pop("works", [])]
    lines += ["Work: " + ", ".join(works) + ".", ""]
    left = by_status.pop("not runnable", [])
    for status, some in sorted(by_status.items()):
        lines += [f"| {status} | why |", "|---|---|"]
        lines += [f"| `{found['model_type']}` | {_cell(_message(found))} |" for found in some]
        lines.append("")
    if left:
        lines += ["| not tried | what the tiny model says without quantkit |", "|---|---|"]
        lines += [f"| `{found['model_type']}` | {_cell(found['message'])} |" for found in left]
        lines.append("")
    return "\n".join(lines)


def _message(found: Mapping[str, Any]) -> str:
    runs = (run for run in found["runs"] if run["status"] == found["status"])
    message = next((f"{run['method']}: {run['message']}" for run in runs), found["message"])
    return str(message).replace("quantize: ", "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
