"""What is printed at the end of a run."""

from __future__ import annotations

from quantkit.cli.summary import degraded_lines


def test_weights_of_a_kind_that_say_the_same_share_a_line() -> None:
    down = {f"model.layers.{k}.mlp.down_proj.weight": "few tokens" for k in range(30)}
    lines = degraded_lines({**down, "model.layers.3.mlp.up_proj.weight": "few tokens"})
    assert lines == [
        "degraded   30 weights model.layers.*.mlp.down_proj.weight: few tokens",
        "degraded   model.layers.3.mlp.up_proj.weight: few tokens",
    ]


def test_other_reasons_have_lines_of_their_own_up_to_a_number() -> None:
    found = {f"layers.{k}.w.weight": f"{k} channels are dead" for k in range(40)}
    lines = degraded_lines(found)
    assert len(lines) == 11
    assert lines[0] == "degraded   layers.0.w.weight: 0 channels are dead"
    assert lines[-1] == "           and 30 more weights, see the report"
    assert degraded_lines({}) == []
