"""Phases of a step: each counted without what runs inside it, and shown in a trace."""

from __future__ import annotations

import json
import time

import pytest

from quantkit.calibration.spans import Timeline, phase


def test_time_inside_a_phase_counts_for_the_inner_one() -> None:
    timeline = Timeline()
    with timeline.step("block 0"):
        with phase("forward"):
            time.sleep(0.02)
            with phase("statistics"):
                time.sleep(0.05)
        with phase("forward"):
            time.sleep(0.02)
    wall = {name: seconds.wall for name, seconds in timeline.steps["block 0"].items()}
    assert set(wall) == {"forward", "statistics", "other"}
    # A sleep ends late, never early; on a busy machine by a lot.
    assert wall["forward"] >= 0.04 and wall["statistics"] >= 0.05
    assert timeline.total("block 0").wall == pytest.approx(sum(wall.values()))


def test_sleeping_takes_wall_seconds_only() -> None:
    timeline = Timeline()
    with timeline.step("s"), phase("fsync"):
        time.sleep(0.05)
    assert timeline.steps["s"]["fsync"].cpu < 0.04


def test_a_trace_holds_every_entry_as_complete_events() -> None:
    timeline = Timeline(events=True)
    for name in ("embed", "block 0"):
        with timeline.step(name), phase("forward"), phase("statistics"):
            pass
    events = json.loads(timeline.trace())["traceEvents"]
    names = ["statistics", "forward", "embed", "statistics", "forward", "block 0"]
    assert [event["name"] for event in events] == names
    for inner, outer in ((0, 1), (1, 2), (3, 4), (4, 5)):
        first, second = events[inner], events[outer]
        assert first["ph"] == second["ph"] == "X"
        # Times are rounded to a tenth of a microsecond.
        assert second["ts"] <= first["ts"] + 0.1
        assert first["ts"] + first["dur"] <= second["ts"] + second["dur"] + 0.2


def test_nothing_is_counted_outside_of_steps() -> None:
    timeline = Timeline(events=True)
    with phase("forward"):
        pass
    with pytest.raises(ZeroDivisionError), timeline.step("s"), phase("range"):
        _ = 1 / 0
    with phase("forward"):
        pass
    assert set(timeline.steps["s"]) == {"range", "other"}
    assert len(json.loads(timeline.trace())["traceEvents"]) == 2
