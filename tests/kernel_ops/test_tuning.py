"""Which tile is chosen: measured, nearest or by rule; and what `quantkit tune` writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quantkit_kernels.gpu import measure, tuning
from quantkit_kernels.gpu.tuning import Entry, Problem, Table, Tile

from quantkit.cli.tune import describe, tune_shapes, wanted
from quantkit.formats.format import StoredWeight
from quantkit.numbers.scheme import Scheme

PROBLEM = Problem(op="w4a16", dtype="bfloat16", group=128, rows=4096, columns=4096, tokens=1)
TILE = Tile(rows=64, tokens=16, split=8, warps=4, stages=4)


def entry(**changes: int) -> Entry:
    tile = replace(TILE, split=changes.pop("split", 8))
    return Entry(problem=replace(PROBLEM, **changes), tile=tile, microseconds=1.0)


def test_an_exact_entry_wins_over_a_near_one() -> None:
    table = Table((entry(split=2, tokens=2), entry(split=4), entry(split=16, rows=8192)))
    found = table.find(PROBLEM)
    assert found is not None and found.tile == replace(TILE, split=4)


def test_the_nearest_shape_is_nearest_in_ratios() -> None:
    table = Table((entry(split=2, rows=8192), entry(split=4, rows=14336)))
    found = table.find(replace(PROBLEM, rows=11008))
    # 11008 / 8192 = 1.34, 14336 / 11008 = 1.30
    assert found is not None and found.tile == replace(TILE, split=4)


def test_other_schemes_and_dtypes_are_never_near() -> None:
    table = Table((entry(),))
    assert table.find(replace(PROBLEM, group=64)) is None
    assert table.find(replace(PROBLEM, dtype="float16")) is None
    assert table.find(replace(PROBLEM, op="w8a16")) is None


def test_the_next_count_of_rows_is_taken_and_none_behind_the_last() -> None:
    table = Table((entry(split=2, tokens=32), entry(split=4, tokens=64)))
    for tokens, split in ((20, 2), (32, 2), (33, 4), (40, 4), (64, 4)):
        found = table.find(replace(PROBLEM, tokens=tokens))
        assert found is not None and found.tile == replace(TILE, split=split)
    for tokens in (1, 16, 65, 8192):
        assert table.find(replace(PROBLEM, tokens=tokens)) is None


def test_a_far_shape_is_not_taken() -> None:
    table = Table((entry(),))
    for rows, columns in ((8192, 4096), (2048, 4096), (4096, 8192), (5120, 5120)):
        assert table.find(replace(PROBLEM, rows=rows, columns=columns)) is not None
    for rows, columns in ((128256, 4096), (8192, 8192), (1024, 4096), (4096, 14336)):
        assert table.find(replace(PROBLEM, rows=rows, columns=columns)) is None


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the tables made here; a GPU called "gpu" is device 0."""
    pytest.importorskip("triton")
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "made"))
    monkeypatch.setattr(tuning, "device_name", lambda device: "gpu")
    monkeypatch.setattr(tuning, "_device", lambda device: (132, 90))
    caches = (tuning.tuned, tuning.choose, tuning.choose_eight)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path / "made"
    for cache in caches:
        cache.cache_clear()


RULE = tuning.heuristic(PROBLEM, 132, 90)


def test_a_table_that_was_made_here_is_used(tables: Path) -> None:
    tuning.write_table(tuning.cache_path("gpu"), Table((entry(),)))
    assert tuning.choose(PROBLEM, 0) == TILE != RULE


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[{",
        "{}",
        "[1]",
        '{"entries": []}',
        '[{"problem": {"op": "w4a16"}, "tile": null, "microseconds": 1}]',
        '[{"tile": null}]',
        "\udcff",
    ],
    ids=["empty", "cut", "object", "number", "newer", "older", "short", "bytes"],
)
def test_a_damaged_table_leaves_the_rule(
    text: str, tables: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tuning.cache_path("gpu")
    tables.mkdir()
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert tuning.choose(PROBLEM, 0) == RULE
    assert tuning.choose(replace(PROBLEM, tokens=2), 0) == tuning.heuristic(
        replace(PROBLEM, tokens=2), 132, 90
    )
    # "{}" is an empty table.
    assert caplog.text.count("the tuned table of gpu is passed over") == (text != "{}")


def test_a_tile_that_no_kernel_can_take_leaves_the_rule(tables: Path) -> None:
    tables.mkdir()
    good = Table((entry(),)).to_json()
    for wrong in ('"rows": 0,', '"rows": "64",', '"rows": 64.5,'):
        tuning.cache_path("gpu").write_text(good.replace('"rows": 64,', wrong))
        tuning.tuned.cache_clear()
        tuning.choose.cache_clear()
        assert tuning.choose(PROBLEM, 0) == RULE


def test_a_table_that_cannot_be_read_leaves_the_rule(
    tables: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def closed(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", closed)
    assert tuning.choose(PROBLEM, 0) == RULE
    assert "Permission denied" in caplog.text


def test_no_home_leaves_the_rule(
    tables: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("QUANTKIT_CACHE")
    monkeypatch.setattr(Path, "home", homeless)
    assert tuning.choose(PROBLEM, 0) == RULE
    assert "there is no home folder" in caplog.text


@pytest.mark.parametrize("tokens", [1, 17, 64, 200])
@pytest.mark.parametrize(("rows", "columns"), [(4096, 4096), (128, 128), (28672, 8192)])
def test_the_rule_covers_the_columns_and_keeps_pipelines_busy(
    rows: int, columns: int, tokens: int
) -> None:
    problem = replace(PROBLEM, rows=rows, columns=columns, tokens=tokens)
    tile = tuning.heuristic(problem, 132, 90)
    assert tile.tokens >= min(tokens, 64) and tile.tokens in (16, 32, 64)
    assert columns // 128 // tile.split >= 4 or tile.split == 1
    assert tile in tuning.candidates(problem, 132, 90)


def test_small_weights_are_split_until_the_gpu_is_full() -> None:
    tile = tuning.heuristic(PROBLEM, 132, 90)
    assert tile.split == 8
    assert tuning.heuristic(replace(PROBLEM, rows=128256), 132, 90).split == 1


def test_tables_survive_the_file(tmp_path: Path) -> None:
    table = Table((entry(), Entry(problem=PROBLEM, tile=None, microseconds=2.5)))
    tuning.write_table(tmp_path / "a" / "gpu.json", table)
    assert tuning.read_table(tmp_path / "a" / "gpu.json") == table
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["gpu.json"]


def test_the_fastest_tile_is_chosen_and_oversized_ones_are_passed_over() -> None:
    pytest.importorskip("triton")
    from triton.runtime.errors import OutOfResources

    calls: list[Tile | None] = []

    def call(tile: Tile | None) -> object:
        calls.append(tile)
        if tile is not None and tile.stages == 4:
            raise OutOfResources(300000, 232448, "shared memory")
        return None

    def time(bound: object) -> float:
        assert isinstance(bound, list)
        bound[0]()
        return 1.0 if calls[-1] is None else 10.0 - calls[-1].stages

    problem = replace(PROBLEM, tokens=16)
    candidate = measure.Candidate(problem=problem, calls=[call])
    found = measure.best(candidate, 132, 90, time)
    assert found.tile is not None and found.tile.stages == 3
    assert found.microseconds == 7.0
    # From 64 rows on, decoding first is tried too.
    many = measure.Candidate(problem=replace(problem, tokens=64), calls=[call])
    assert measure.best(many, 132, 90, time).tile is None


def test_a_checkpoints_shapes_are_tuned_once_each(tmp_path: Path) -> None:
    def stored(name: str, scheme: str, shape: tuple[int, int]) -> StoredWeight:
        return StoredWeight(
            name=name,
            scheme=Scheme.parse(scheme),
            shape=shape,
            label="BF16",
            tensors=(name,),
        )

    weights = [
        stored("a", "w4a16_g128", (256, 128)),
        stored("b", "w4a16_g128", (256, 128)),
        stored("c", "w8a8_row", (256, 128)),
        stored("d", "w3a16_g128", (256, 128)),
        stored("e", "fp8a8_row", (256, 128)),
        stored("f", "fp8a16_row", (256, 128)),
    ]
    problems = wanted(weights, torch.bfloat16)
    assert len(problems) == 4 * len(tuning.BUCKETS)
    assert {problem.op for problem in problems} == {"w4a16", "w8a8", "fp8a8", "fp8a16"}
    path = tmp_path / "gpu.json"
    done = tune_shapes(
        problems, lambda problem: Entry(problem=problem, tile=TILE, microseconds=3.0), path
    )
    assert tuning.read_table(path).entries == tuple(done)
    assert "3.0 us" in describe(done[0])
