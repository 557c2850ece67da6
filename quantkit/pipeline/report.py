"""The report of a run: every decision, figure and fallback, as JSON, Markdown and one HTML page.

It depends on the job only, never on the machine's speed: times and peaks are in run.json.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from quantkit.calibration.data.tokens import Calibration
from quantkit.checkpoint.memory import format_size
from quantkit.checkpoint.record import FATES
from quantkit.pipeline.budget.choose import Choice
from quantkit.pipeline.plan import Plan
from quantkit.pipeline.records import Record, WeightRecord

VERSION = 1
_WORST = 10


def build_report(
    plan: Plan,
    calibration: Calibration | None,
    records: Sequence[Record],
    fingerprint: Mapping[str, str],
    *,
    budget: Choice | None = None,
) -> dict[str, Any]:
    """The report as JSON values, in a fixed order."""
    weights = [weight for record in records for weight in record.weights]
    source_bytes = sum(fate.source_bytes for fate in plan.fates)
    return {
        "version": VERSION,
        "method": plan.recipe.method,
        "scheme": plan.recipe.scheme.name,
        "fitted": plan.fitted,
        "format": plan.format.name,
        "model_type": plan.model_type,
        "recipe": plan.recipe.to_dict(),
        **({} if budget is None else {"budget": budget.reported(plan)}),
        "size": {
            "source_bytes": source_bytes,
            "bytes": plan.layout.num_bytes,
            "bits_per_weight": round(plan.bits_per_weight, 4),
            "bits_per_quantized_weight": round(plan.bits_per_quantized_weight, 4),
        },
        "readers": dict(plan.readers),
        "calibration": None if calibration is None else calibration.record.to_dict(),
        "folded": [name for record in records for name in record.folded],
        **_refined(records),
        "unties_head": plan.unties_head,
        "notes": [*plan.notes, *_notes(weights)],
        "degraded": {w.name: w.degraded for w in weights if w.degraded is not None},
        **({} if (experts := _experts(plan, weights)) is None else {"experts": experts}),
        "weights": [
            {
                "name": weight.name,
                "scheme": weight.scheme,
                "error": weight.error,
                "expected": weight.expected,
                "clipped": weight.clipped,
                "beyond_half": weight.beyond_half,
                "degraded": weight.degraded,
                "tokens": weight.tokens,
            }
            for weight in weights
        ],
        "tensors": [
            {
                "name": fate.name,
                "fate": fate.fate,
                "reason": fate.reason,
                "scheme": None if fate.scheme is None else fate.scheme.name,
                "shape": list(fate.shape),
                "dtype": str(fate.dtype).removeprefix("torch."),
                "bytes": fate.num_bytes,
                "output": [info.stored for info in fate.output],
            }
            for fate in plan.fates
        ],
        "fingerprint": dict(fingerprint),
    }


def _refined(records: Sequence[Record]) -> dict[str, object]:
    """By step, the loss of a block's outputs on text that is held out, if they were refined."""
    found = {
        record.step: {"before": record.refined[0], "after": record.refined[1]}
        for record in records
        if record.refined is not None
    }
    return {"refined": found} if found else {}


def _experts(plan: Plan, weights: Sequence[WeightRecord]) -> list[dict[str, Any]] | None:
    """How many tokens the router sent to each expert, layer by layer; None without calibration."""
    tokens = {weight.name: weight.tokens for weight in weights}
    found: dict[str, dict[int, int]] = {}
    for refs in plan.refs:
        for ref in refs:
            count = tokens.get(ref.name)
            if ref.expert is not None and count is not None:
                layer = found.setdefault(f"block {ref.block}", {})
                layer[ref.expert] = max(count, layer.get(ref.expert, 0))
    if not found:
        return None
    return [
        {"layer": layer, "tokens": [count for _, count in sorted(counts.items())]}
        for layer, counts in found.items()
    ]


def _notes(weights: Sequence[WeightRecord]) -> list[str]:
    """What to know about the checkpoint as a whole."""
    beyond = [weight.beyond_half for weight in weights if weight.beyond_half]
    if not beyond:
        return []
    return [
        f"{sum(beyond)} scales in {len(beyond)} weights are too small or too large for float16, "
        "which rounds them: serve it in bfloat16 or float32, not with --dtype float16"
    ]


def fate_counts(report: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """(fate, tensors, bytes) in a fixed order."""
    found: dict[str, list[int]] = {fate: [0, 0] for fate in FATES}
    for tensor in report["tensors"]:
        found[tensor["fate"]][0] += 1
        found[tensor["fate"]][1] += tensor["bytes"]
    return [(fate, count, size) for fate, (count, size) in found.items() if count]


def _view(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the page templates show."""
    size = report["size"]
    return {
        "report": report,
        "ratio": size["source_bytes"] / max(size["bytes"], 1),
        "fates": fate_counts(report),
        "worst": sorted(report["weights"], key=lambda w: -w["error"])[:_WORST],
        "size": format_size,
        "names": lambda names: ", ".join(names) or "none",
    }


def render_markdown(report: Mapping[str, Any]) -> str:
    """The report for reading in a terminal or on the Hub."""
    return _template(_MARKDOWN, False).render(_view(report))


def render_html(report: Mapping[str, Any]) -> str:
    """One self-contained page: no network, readable in light and dark, printable."""
    return _template(_HTML, True).render(_view(report))


def render_model_card(report: Mapping[str, Any]) -> str:
    """README.md of the checkpoint for the Hub: front matter, how it was made, how to load it."""
    return _template(_CARD, False).render(_view(report))


@functools.cache
def _template(text: str, autoescape: bool) -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=autoescape, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(text)


_SUMMARY = """\
| | |
|---|---|
| method | {{ report.method }}, scheme {{ report.scheme }} |
{% if report.fitted %}
| groups | {{ report.fitted }} |
{% endif %}
| format | {{ report.format }} |
| size | {{ size(report.size.bytes) }}, {{ "%.2f" | format(ratio) }}x smaller than {{ size(report.size.source_bytes) }} |
| bits per weight | {{ report.size.bits_per_weight }} in all, {{ report.size.bits_per_quantized_weight }} among quantized weights |
{% if report.calibration %}
| calibration | {{ report.calibration.source }}: {{ report.calibration.samples }} x {{ report.calibration.seq_len }} tokens, seed {{ report.calibration.seed }} |
{% else %}
| calibration | none needed |
{% endif %}
{% for runtime, reason in report.readers.items() %}
| {{ runtime }} | {{ "reads it" if reason is none else "does not read it: " ~ reason }} |
{% endfor %}
"""  # noqa: E501

_BESIDE = """\
{% if report.side_files %}

## Files beside the weights
Carried over: {{ names(report.side_files.carried) }}.
{% for name, reason in report.side_files.left.items() %}
- left out: `{{ name }}`: {{ reason }}
{% endfor %}
{% endif %}
"""

_MARKDOWN = (
    """\
# Quantization report

"""
    + _SUMMARY
    + """
## Tensors
| fate | tensors | size |
|---|---|---|
{% for fate, count, bytes in fates %}
| {{ fate }} | {{ count }} | {{ size(bytes) }} |
{% endfor %}

## Largest relative output errors
| weight | scheme | error |
|---|---|---|
{% for weight in worst %}
| {{ weight.name }} | {{ weight.scheme }} | {{ "%.3e" | format(weight.error) }} |
{% endfor %}
{% if report.experts %}

## Tokens that the router sent to each expert
Statistics are of {{ "all tokens" if report.recipe.experts == "all" else "these" }}.

| layer | least | most | experts without any | each |
|---|---|---|---|---|
{% for layer in report.experts %}
| {{ layer.layer }} | {{ layer.tokens | min }} | {{ layer.tokens | max }} | {{ layer.tokens.count(0) }} | {{ layer.tokens | join(", ") }} |
{% endfor %}
{% endif %}
{% for note in report.notes %}

Note: {{ note }}.
{% endfor %}
"""  # noqa: E501
    + _BESIDE
    + """\
{% if report.degraded %}

## Degraded
{% for name, note in report.degraded.items() %}
- `{{ name }}`: {{ note }}
{% endfor %}
{% endif %}
"""
)

_CARD = (
    """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- quantkit
- {{ report.method }}
- {{ report.format }}
---

# Quantized with quantkit

"""
    + _SUMMARY
    + """
Every decision, the error of each weight and full provenance: `quantkit/report.json`, or
`quantkit/report.html` in a browser.

```python
import quantkit

model = quantkit.load("PATH")
```
"""
    + _BESIDE
)

_HTML = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Quantization report: {{ report.method }}</title>
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --bad: #c2410c; --bar: #2563eb; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.cards { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0; }
.card { border: 1px solid var(--line); border-radius: .6rem; padding: .6rem 1rem; flex: 1 1 8rem; }
.card b { display: block; font-size: 1.4rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
code { font-size: .88em; overflow-wrap: anywhere; } .bad { color: var(--bad); }
.bar { background: var(--bar); height: .7rem; border-radius: .2rem; min-width: 1px; }
details { margin-top: 1rem; } summary { cursor: pointer; }
@media print { details { display: none; } }
</style>
</head>
<body>
<h1>{{ report.method }} · {{ report.scheme }}</h1>
<div>{{ report.model_type }} model, written as {{ report.format }}</div>
<div class="cards">
<div class="card"><b>{{ "%.2f" | format(ratio) }}x</b>smaller</div>
<div class="card"><b>{{ size(report.size.bytes) }}</b>was {{ size(report.size.source_bytes) }}</div>
<div class="card"><b>{{ "%.3f" | format(report.size.bits_per_weight) }}</b>bits per weight</div>
<div class="card"><b>{{ report.weights | length }}</b>weights quantized</div>
<div class="card"><b class="{{ 'bad' if report.degraded else '' }}">
{{ report.degraded | length }}</b>degraded</div>
</div>
<h2>Which runtimes read it</h2>
<div class="wide"><table>
{% for runtime, reason in report.readers.items() %}
<tr><td>{{ runtime }}</td><td>{{ "reads it" if reason is none else reason }}</td></tr>
{% endfor %}
</table></div>
{% if report.calibration %}
<h2>Calibration</h2>
<p>{{ report.calibration.source }}: {{ report.calibration.samples }} sequences of
{{ report.calibration.seq_len }} tokens, {{ report.calibration.tokens }} tokens in all, seed
{{ report.calibration.seed }}. Tokens sha256 <code>{{ report.calibration.tokens_sha256 }}</code></p>
{% endif %}
<h2>What happened to every tensor</h2>
<div class="wide"><table>
<tr><th>fate</th><th class="number">tensors</th><th class="number">size</th></tr>
{% for fate, count, bytes in fates %}
<tr><td>{{ fate }}</td><td class="number">{{ count }}</td><td class="number">{{ size(bytes) }}</td>
</tr>
{% endfor %}
</table></div>
<h2>Largest relative output errors</h2>
<div class="wide"><table>
<tr><th>weight</th><th>scheme</th><th class="number">error</th><th style="width: 30%"></th></tr>
{% for weight in worst %}
<tr><td><code>{{ weight.name }}</code></td><td>{{ weight.scheme }}</td>
<td class="number">{{ "%.3e" | format(weight.error) }}</td>
<td><div class="bar" style="width: {{ (100 * weight.error / (worst[0].error or 1)) | round(1) }}%">
</div></td></tr>
{% endfor %}
</table></div>
{% if report.experts %}
<h2>Tokens that the router sent to each expert</h2>
<p>Statistics are of {{ "all tokens" if report.recipe.experts == "all" else "these" }}.</p>
<div class="wide"><table>
<tr><th>layer</th><th class="number">least</th><th class="number">most</th>
<th class="number">without any</th><th>each</th></tr>
{% for layer in report.experts %}
<tr><td>{{ layer.layer }}</td><td class="number">{{ layer.tokens | min }}</td>
<td class="number">{{ layer.tokens | max }}</td>
<td class="number">{{ layer.tokens.count(0) }}</td>
<td>{{ layer.tokens | join(", ") }}</td></tr>
{% endfor %}
</table></div>
{% endif %}
{% for note in report.notes %}
<p>Note: {{ note }}.</p>
{% endfor %}
{% if report.degraded %}
<h2 class="bad">Degraded</h2>
<ul>
{% for name, note in report.degraded.items() %}
<li><code>{{ name }}</code>: {{ note }}</li>
{% endfor %}
</ul>
{% endif %}
{% if report.side_files %}
<h2>Files beside the weights</h2>
<p>Carried over: {{ names(report.side_files.carried) }}.</p>
{% if report.side_files.left %}
<ul>
{% for name, reason in report.side_files.left.items() %}
<li>left out: <code>{{ name }}</code>: {{ reason }}</li>
{% endfor %}
</ul>
{% endif %}
{% endif %}
<details><summary>All tensors</summary>
<div class="wide"><table>
<tr><th>tensor</th><th>fate</th><th>scheme</th><th>reason</th><th class="number">bytes</th></tr>
{% for tensor in report.tensors %}
<tr><td><code>{{ tensor.name }}</code></td><td>{{ tensor.fate }}</td>
<td>{{ tensor.scheme or "" }}</td><td>{{ tensor.reason }}</td>
<td class="number">{{ tensor.bytes }}</td></tr>
{% endfor %}
</table></div></details>
<details><summary>Provenance</summary>
<div class="wide"><table>
{% for field, value in report.fingerprint.items() %}
<tr><td>{{ field }}</td><td><code>{{ value }}</code></td></tr>
{% endfor %}
</table></div></details>
</body>
</html>
"""
