"""quantkit::w4a16_experts: the grouped kernel in the interpreter and the CPU path against loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kernel_cases as cases
import pytest
import torch
from inference.test_layers import Experts, make_tensor, same
from inference.test_load import make_model, write_quantized
from quantkit_kernels.gpu.tuning import Problem, Tile, heuristic
from quantkit_kernels.ops import w4a16, w4a16_experts
from quantkit_kernels.ops.device import Device
from torch import Tensor

from quantkit.inference.experts import PackedExperts
from quantkit.inference.layers import QuantExperts, QuantLinear
from quantkit.inference.load import load
from quantkit.model.experts import run_sorted_experts

EXPERTS, ROWS = 5, 70


def stacked(
    columns: int, group: int | None, asym: bool, device: Device
) -> tuple[w4a16.Packed, list[Tensor]]:
    """The packed weights of all experts, and each in float64."""
    packed, exact = [], []
    for expert in range(EXPERTS):
        codes, scale, zero = cases.int_weight((ROWS, columns), group, asym=asym, seed=expert)
        packed.append(w4a16.pack(codes, scale, zero, group, device))
        exact.append(cases.decoded(codes, scale, zero))
    return w4a16_experts.stack(packed), exact


def routing(counts: list[int], tokens: int) -> tuple[Tensor, Tensor]:
    """(source, offsets) of so many rows for each expert."""
    source = torch.randint(0, tokens, (sum(counts),), generator=cases.generator(3))
    ends = torch.tensor(counts).cumsum(0)
    return source, torch.cat([ends[:1] * 0, ends]).to(torch.int32)


def loop(x: Tensor, source: Tensor, offsets: Tensor, exact: list[Tensor]) -> Tensor:
    """The definition in float64."""
    out = torch.zeros(len(source), ROWS, dtype=torch.float64)
    for row in range(int(offsets[0]), int(offsets[-1])):
        expert = int((offsets[1:] <= row).sum())
        out[row] = exact[expert] @ x[source[row]].double()
    return out


@pytest.mark.parametrize(
    ("counts", "split"),
    [([1, 0, 0, 0, 0], 1), ([0, 3, 0, 1, 0], 2), ([17, 0, 16, 33, 1], 1)],
    ids=["one", "few", "many"],
)
@pytest.mark.parametrize(
    ("group", "columns", "asym"),
    [(128, 256, False), (64, 192, True), (32, 160, True), (None, 75, False)],
    ids=str,
)
def test_the_grouped_kernel_equals_float64(
    group: int | None,
    columns: int,
    asym: bool,
    counts: list[int],
    split: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from quantkit_kernels.gpu import experts as experts_triton

    weight, exact = stacked(columns, group, asym, "triton")
    source, offsets = routing(counts, 9)
    x = cases.activations((9, columns), torch.float16)
    tile = Tile(rows=64, tokens=16, split=split, warps=4, stages=2)
    wanted = loop(x, source, offsets, exact)
    cases.poison(monkeypatch)
    found = experts_triton.matmul(
        x,
        source,
        offsets,
        weight.packed,
        weight.scale,
        weight.zero,
        weight.group_size,
        ROWS,
        tile,
        use_asm=False,
    )
    # One rounding of the result to 11 bits.
    assert cases.relative_error(found, wanted) < 2**-11


def test_rows_that_no_expert_has_become_zeros() -> None:
    from quantkit_kernels.gpu import experts as experts_triton

    weight, exact = stacked(128, 32, False, "triton")
    source, offsets = routing([2, 0, 3, 0, 1], 4)
    x = cases.activations((4, 128), torch.float16)
    wanted = loop(x, source, offsets, exact)
    # The first and the last row belong to numbers below and above those of experts.
    outside = torch.cat([source[:1], source, source[:1]]), offsets + 1
    tile = Tile(rows=64, tokens=16, split=1, warps=4, stages=2)
    parts = (weight.packed, weight.scale, None, 32, ROWS)
    found = experts_triton.matmul(x, *outside, *parts, tile, use_asm=False)
    assert not found[0].any() and not found[-1].any()
    assert cases.relative_error(found[1:-1], wanted) < 2**-11
    slow = w4a16_experts.reference(x, *outside, *parts)
    assert not slow[0].any() and not slow[-1].any()


@pytest.mark.parametrize("group", [32, None], ids=str)
@pytest.mark.parametrize("asym", [False, True], ids=["sym", "asym"])
def test_the_cpu_op_equals_float64_and_is_well_formed(group: int | None, asym: bool) -> None:
    columns = 160 if group else 75
    weight, exact = stacked(columns, group, asym, "cpu")
    source, offsets = routing([2, 0, 50, 1, 0], 9)
    x = cases.activations((9, columns), torch.bfloat16)
    rest = (weight.packed, weight.scale, weight.zero, weight.group_size, ROWS)
    found = torch.ops.quantkit.w4a16_experts(x, source, offsets, *rest)
    # Weights, products and the result are rounded to bfloat16.
    wanted = loop(x, source, offsets, exact)
    assert cases.relative_error(found, wanted) < 2**-6
    slow = w4a16_experts.reference(x, source, offsets, *rest)
    assert cases.relative_error(slow, wanted) < 2**-6
    torch.library.opcheck(torch.ops.quantkit.w4a16_experts.default, (x, source, offsets, *rest))
    empty = torch.ops.quantkit.w4a16_experts(x, source[:0], offsets * 0, *rest)
    assert empty.shape == (0, ROWS)


def test_the_op_on_a_gpu_reaches_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    import contextlib
    import functools

    from quantkit_kernels.gpu import experts as experts_triton
    from quantkit_kernels.gpu import tuning

    asked: list[tuple[Problem, int]] = []

    def choose(problem: Problem, experts: int, device: int | None) -> Tile:
        asked.append((problem, experts))
        return heuristic(problem, 132, 90, experts=experts)

    monkeypatch.setattr(tuning, "choose_experts", choose)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    plain = functools.partial(experts_triton.matmul, use_asm=False)
    monkeypatch.setattr(experts_triton, "matmul", plain)
    weight, exact = stacked(128, 64, True, "triton")
    source, offsets = routing([2, 0, 3, 0, 1], 4)
    x = cases.activations((128, 4), torch.float16).t()
    rest = (weight.packed, weight.scale, weight.zero, 64, ROWS)
    found = w4a16_experts._cuda(x, source, offsets, *rest)
    assert cases.relative_error(found, loop(x, source, offsets, exact)) < 2**-11
    assert asked[0][1] == EXPERTS and asked[0][0].tokens == 6
    assert w4a16_experts._cuda(x, source[:0], offsets * 0, *rest).shape == (0, ROWS)


@pytest.mark.parametrize("rows", [1, 2, 63, 4096])
def test_the_rule_for_experts_fits_their_share_of_the_rows(rows: int) -> None:
    problem = Problem(
        op="w4a16_experts", dtype="bfloat16", group=128, rows=1536, columns=4096, tokens=rows
    )
    tile = heuristic(problem, 132, 90, experts=128)
    assert tile.tokens == (32 if rows == 4096 else 16)
    # One token leaves most of the GPU idle unless its columns are split; 128 experts do not.
    assert (tile.split > 1) == (rows <= 2)


def layers(base: Experts, name: str, backend: Any) -> QuantExperts:
    """The experts quantized for a backend, both projections."""
    projections: dict[str, Any] = {}
    for leaf, pieces in (("gate_up_proj", 2), ("down_proj", 1)):
        whole = base.get_parameter(leaf)
        shape = (whole.shape[1] // pieces, whole.shape[2])
        tensors = [
            [
                make_tensor(name, shape, seed=pieces * expert + piece, dtype=torch.bfloat16)
                for piece in range(pieces)
            ]
            for expert in range(base.num_experts)
        ]
        if backend == "sorted":
            projections[leaf] = PackedExperts.of(tensors)
        else:
            projections[leaf] = [
                [QuantLinear(tensor, backend=backend) for tensor in found] for found in tensors
            ]
    return QuantExperts(base, projections)


@pytest.mark.parametrize("name", ["w4a16_g32", "w4a16_g32_asym", "w4a16_row"])
def test_sorted_experts_give_what_the_loop_gives(name: str) -> None:
    torch.manual_seed(0)
    index, weight = torch.randint(0, 6, (11, 2)), torch.rand(11, 2)
    x = torch.randn(11, 32).bfloat16()
    # Numbers from num_experts up mean "no expert".
    assert (index >= 5).any()
    found = []
    for backend in ("sorted", "cpu", "reference"):
        torch.manual_seed(1)
        base = Experts(5, 32, 64).bfloat16().requires_grad_(False)
        quantized = layers(base, name, backend)
        assert quantized.sorted == (backend == "sorted")
        found.append(quantized(x, index, weight.bfloat16()).double())
    # The loop rounds each expert's part to bfloat16 before adding, and the reference its weights.
    assert (found[0] - found[1]).abs().max() <= 2**-6 * found[1].abs().max()
    assert (found[0] - found[2]).abs().max() <= 2**-6 * found[2].abs().max()


def test_packed_experts_give_their_tensors_back_bit_for_bit() -> None:
    tensors = [
        [make_tensor("w4a16_g32_asym", (24, 64), seed=2 * expert + piece) for piece in range(2)]
        for expert in range(3)
    ]
    packed = PackedExperts.of(tensors)
    assert packed is not None
    assert "experts=3" in repr(packed) and "out_features=48" in repr(packed)
    for expert, pieces in enumerate(tensors):
        for piece, tensor in enumerate(pieces):
            assert same(packed.half().tensor(expert, piece), tensor)


def test_experts_of_different_schemes_are_not_packed() -> None:
    one, other = make_tensor("w4a16_g32", (24, 64)), make_tensor("w4a16_row", (24, 64))
    assert PackedExperts.of([[one], [one]]) is not None
    assert PackedExperts.of([[one], [other]]) is None
    short = torch.bfloat16
    assert PackedExperts.supported(one, short, "auto") is None
    assert "one expert at a time" in str(PackedExperts.supported(one, short, "reference"))
    eight = make_tensor("w8a16_row", (24, 64))
    assert "8-bit" in str(PackedExperts.supported(eight, short, "auto"))


def test_the_router_may_ask_for_no_expert_at_all() -> None:
    base = Experts(5, 32, 64).bfloat16().requires_grad_(False)
    quantized = layers(base, "w4a16_g32", "sorted")
    x = torch.randn(3, 32).bfloat16()
    nobody = torch.full((3, 2), 5)
    out = run_sorted_experts(base, x, nobody, torch.ones(3, 2), quantized._project_sorted)
    assert torch.equal(out, torch.zeros_like(x))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_model_of_experts_agrees_with_the_reference_backend(kind: str, tmp_path: Path) -> None:
    write_quantized(make_model(kind), tmp_path / "out", "w4a16_g32", "compressed-tensors")
    plain, fast = (load(tmp_path / "out", backend=name) for name in ("reference", "auto"))
    parts = [module for module in fast.modules() if isinstance(module, QuantExperts)]
    assert parts and all(part.sorted for part in parts)
    ids = torch.arange(3, 13).view(1, 10)
    with torch.no_grad():
        wanted, found = plain(ids).logits, fast(ids).logits
        # bfloat16 weights, products and sums through two blocks.
        assert (found - wanted).abs().max() <= 2**-4 * wanted.abs().max()


def test_experts_compile_whole() -> None:
    base = Experts(5, 32, 64).bfloat16().requires_grad_(False)
    quantized = layers(base, "w4a16_g32", "sorted")
    torch._dynamo.reset()
    compiled = torch.compile(quantized, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 7):
        x, index = torch.randn(tokens, 32).bfloat16(), torch.randint(0, 5, (tokens, 2))
        weight = torch.rand(tokens, 2).bfloat16()
        assert torch.equal(compiled(x, index, weight), quantized(x, index, weight))
    torch._dynamo.reset()
