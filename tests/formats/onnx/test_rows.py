"""Weights are found in a graph by their numbers, fused, split or as they are."""

from __future__ import annotations

import torch

from quantkit.formats.onnx.rows import RowIndex, Run


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {name: torch.randn(6, 8, generator=generator) for name in "qkv"}
    found["v"][2:4] = 0  # equal rows
    found["wide"] = torch.randn(4, 16, generator=generator)
    return found


def index() -> RowIndex:
    made = RowIndex()
    for name, values in weights().items():
        made.add(name, values)
    return made


def test_a_whole_weight_is_one_run() -> None:
    for name, values in weights().items():
        assert index().find(values) == (Run(weight=name, start=0, stop=len(values)),)


def test_fused_and_split_weights_are_runs_in_order() -> None:
    parts = weights()
    fused = torch.cat([parts["q"], parts["v"][3:], parts["k"][1:3]])
    assert index().find(fused) == (
        Run(weight="q", start=0, stop=6),
        # Of two equal rows the first that leads on for longest.
        Run(weight="v", start=3, stop=6),
        Run(weight="k", start=1, stop=3),
    )


def test_a_row_that_is_nowhere_or_as_wide_as_no_weight_is_not_found() -> None:
    values = weights()["q"].clone()
    values[5, 7] += 2**-20
    assert index().find(values) == ()
    assert index().find(torch.zeros(2, 4)) == ()


def test_a_weight_whose_rows_are_not_all_used_is_named() -> None:
    made = index()
    all_of = [made.find(values) for values in weights().values()]
    assert made.unused(run for runs in all_of for run in runs) is None
    assert made.unused(run for runs in all_of[1:] for run in runs) == "q"
    assert made.unused(iter([Run(weight="q", start=0, stop=5), *all_of[1], *all_of[2]])) == "q"
