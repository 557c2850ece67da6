"""The files around the weights: configuration, tokenizer, recipe, report and model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from quantkit.checkpoint.disk import disk_errors, write_file
from quantkit.checkpoint.dtypes import name_of
from quantkit.checkpoint.manifest import RUN
from quantkit.checkpoint.record import REPORT
from quantkit.checkpoint.sidefiles import copy_side_files, side_record
from quantkit.formats.format import DescribedFormat
from quantkit.formats.stored import model_dtype
from quantkit.model.causal import CausalModel
from quantkit.pipeline.plan import Plan
from quantkit.pipeline.report import render_html, render_markdown, render_model_card

RECIPE = "quantkit/recipe.yaml"


def write_finished_files(
    directory: Path,
    *,
    model: CausalModel,
    plan: Plan,
    report: Mapping[str, Any],
    recipe: Mapping[str, Any] | None,
    run: Mapping[str, object],
) -> None:
    """Writes everything but the shards; all of it except `run.json` depends on the job only.

    To the report comes what travelled beside the weights, and what did not.

    `recipe` is None where another tool quantized the weights and nobody knows it.
    """
    beside = side_record(model.source, plan.format.name, plan.layout)
    report = {**report, "side_files": beside.to_dict()}
    contents: dict[str, bytes] = {
        REPORT: _json(report),
        RUN: _json(run),
        "quantkit/report.md": render_markdown(report).encode(),
        "quantkit/report.html": render_html(report).encode(),
        "README.md": render_model_card(report).encode(),
    }
    if recipe is not None:
        contents[RECIPE] = yaml.safe_dump(dict(recipe), sort_keys=False).encode()
    if (index := plan.layout.index()) is not None:
        contents["model.safetensors.index.json"] = index
    if (own := plan.layout.side_files) is not None:
        contents |= own
    else:
        contents["config.json"] = _json(_config(model, plan))
        if isinstance(plan.format, DescribedFormat):
            described = plan.format.side_files(plan.quantization_config)
            contents |= {name: _json(data) for name, data in described.items()}
        copy_side_files(model.source, directory)
    with disk_errors(directory):
        for name, data in contents.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            write_file(directory / name, data)


def _config(model: CausalModel, plan: Plan) -> dict[str, Any]:
    """config.json of the result: the source's, with how it is quantized."""
    config = dict(model.source.config)
    config["quantization_config"] = dict(plan.quantization_config)
    text = config.get("text_config") or {}
    if not any(part.get(key) for part in (config, text) for key in ("dtype", "torch_dtype")):
        # Packed tensors and their scales no longer tell it.
        config["dtype"] = name_of(model_dtype(model.source))
    if plan.unties_head:
        config["tie_word_embeddings"] = False
    return config


def _json(data: object) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
