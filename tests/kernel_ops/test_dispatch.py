"""What the ops do on a GPU, from x of any shape to the kernels, with the kernels interpreted."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import kernel_cases as cases
import pytest
import torch
from quantkit_kernels.gpu import tuning
from quantkit_kernels.gpu.tuning import Problem, Tile
from quantkit_kernels.ops import device, e2m1, fp8a8, fp8a16, nf4, w4a16, w8a8, w8a16, weight_only
from quantkit_kernels.ops.codebook import E2M1, NF4

TILE = Tile(rows=64, tokens=16, split=2, warps=4, stages=2)
ROWS, COLUMNS = 37, 192


@pytest.fixture(params=[TILE, None], ids=["fused", "decoded"])
def asked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """The problems that were looked up; the kernels run in the interpreter, on CPU tensors."""
    pytest.importorskip("triton")
    from quantkit_kernels.gpu import fused as fused_triton

    problems: list[Problem] = []

    def choose(problem: Problem, device: int | None) -> Tile | None:
        problems.append(problem)
        return request.param or (TILE if problem.op in ("w8a8", "fp8a8") else None)

    monkeypatch.setattr(tuning, "choose", choose)
    monkeypatch.setattr(tuning, "choose_eight", choose)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for name in ("multiply", "dequantize"):
        plain = functools.partial(getattr(fused_triton, name), use_asm=False)
        monkeypatch.setattr(fused_triton, name, plain)
    return problems


def check(run: Any, weight: torch.Tensor, asked: list[Problem]) -> None:
    """3-D, strided and empty x against float64."""
    bias = torch.randn(ROWS)
    whole = cases.activations((2, COLUMNS, 3), torch.float16)
    x = whole.transpose(1, 2)
    found = run(x, bias)
    assert found.shape == (2, 3, ROWS) and found.is_contiguous()
    # float16 weights, or their codebook, and the result are rounded.
    assert cases.relative_error(found, cases.expected(x, weight, bias)) < 2**-9
    assert (asked[0].tokens, asked[0].rows, asked[0].columns) == (6, ROWS, COLUMNS)
    assert asked[0].dtype == "float16"
    assert run(x[:0], None).shape == (0, 3, ROWS)


@pytest.mark.parametrize("asym", [False, True], ids=["sym", "asym"])
def test_int4(asym: bool, asked: list[Problem]) -> None:
    codes, scale, zero = cases.int_weight((ROWS, COLUMNS), 64, asym=asym)
    four = w4a16.pack(codes, scale, zero, 64, "triton")
    check(
        lambda x, bias: w4a16._cuda(x, four.packed, four.scale, four.zero, bias, 64, ROWS),
        cases.decoded(codes, scale, zero),
        asked,
    )
    assert asked[0].op == "w4a16" and asked[0].group == 64


def test_int8(asked: list[Problem]) -> None:
    codes, scale, _ = cases.int_weight((ROWS, COLUMNS), None, bits=8)
    eight = w8a16.pack(codes, scale, None, "triton")
    check(
        lambda x, bias: w8a16._cuda(x, eight.packed, eight.scale, bias, 0, ROWS),
        cases.decoded(codes, scale, None, bits=8),
        asked,
    )


def test_e2m1(asked: list[Problem]) -> None:
    codes = torch.randint(0, 16, (ROWS, COLUMNS), dtype=torch.uint8)
    scale, outer = torch.full((ROWS, COLUMNS // 16), 2.5), torch.tensor(0.01)
    four = e2m1.pack(codes, scale, outer, 16, "triton")
    check(
        lambda x, bias: e2m1._cuda(x, four.packed, four.scale, four.outer, bias, 16, ROWS),
        torch.tensor(E2M1).double()[codes.long()] * 2.5 * outer.double(),
        asked,
    )
    assert asked[0].op == "e2m1" and asked[0].group == 16


def test_fp8(asked: list[Problem]) -> None:
    codes, scale, weight = cases.float8_weight((ROWS, COLUMNS), None)
    packed = fp8a16.pack(codes, scale, None, "triton")
    check(
        lambda x, bias: fp8a16._cuda(x, packed.packed, packed.scale, bias, 0, ROWS), weight, asked
    )
    assert asked[0].op == "fp8a16"


def test_fp8_activations(asked: list[Problem]) -> None:
    codes, scale, _ = cases.float8_weight((ROWS, COLUMNS), None)
    weight, padded = fp8a8.pack(codes, scale.view(-1))
    x, bias = cases.activations((2, 3, COLUMNS), torch.float16), torch.randn(ROWS)
    found = fp8a8._cuda(x, weight, padded, bias, ROWS)
    wanted = fp8a8.reference(x.float(), weight, padded, bias, ROWS)
    assert cases.relative_error(found, wanted.double()) < 2**-11
    assert asked[0].op == "fp8a8" and asked[0].tokens == 6
    assert fp8a8._cuda(x[:0], weight, padded, None, ROWS).shape == (0, 3, ROWS)


def test_nf4(asked: list[Problem]) -> None:
    draw = cases.generator(0)
    codes = torch.randint(0, 16, (ROWS, COLUMNS), generator=draw, dtype=torch.uint8)
    scale = torch.rand(ROWS, COLUMNS // 64, generator=draw) + 0.1
    packed = nf4.pack(codes, scale, "triton")
    book = torch.tensor(NF4, dtype=torch.float64)
    check(
        lambda x, bias: nf4._cuda(x, packed.packed, packed.scale, None, None, None, bias, ROWS),
        book[codes.long()] * scale.double().repeat_interleave(64, 1),
        asked,
    )


def test_w8a8(asked: list[Problem]) -> None:
    codes, scale, _ = cases.int_weight((ROWS, COLUMNS), None, bits=8)
    weight, padded = w8a8.pack(codes, scale.view(-1))
    x, bias = cases.activations((2, 3, COLUMNS), torch.float16), torch.randn(ROWS)
    found = w8a8._cuda(x, weight, padded, bias, ROWS)
    wanted = w8a8.reference(x.float(), weight, padded, bias, ROWS)
    assert cases.relative_error(found, wanted.double()) < 2**-11
    assert asked[0].op == "w8a8" and asked[0].tokens == 6
    assert w8a8._cuda(x[:0], weight, padded, None, ROWS).shape == (0, 3, ROWS)


@pytest.mark.parametrize("asked", [None], indirect=True, ids=["decoded"])
def test_what_a_gradient_multiplies_by_is_decoded_by_the_kernel(asked: list[Problem]) -> None:
    codes, scale, zero = cases.int_weight((ROWS, COLUMNS), 64, asym=True)
    four = w4a16.pack(codes, scale, zero, 64, "triton")
    eight = w8a16.pack(codes, scale, 64, "triton")
    floats = fp8a16.pack(codes, scale, 64, "triton")
    normal = nf4.pack(codes, scale, "triton")
    for op, parts in (
        (w4a16, (four.packed, four.scale, four.zero, 64)),
        (w8a16, (eight.packed, eight.scale, 64)),
        (fp8a16, (floats.packed, floats.scale, 64)),
        (nf4, (normal.packed, normal.scale, None, None, None)),
    ):
        found = weight_only.decoder(op._weight)(*parts, (ROWS, COLUMNS), torch.float32)
        wanted = op.dequantize(*parts, (ROWS, COLUMNS), torch.float32)
        # The interpreter's codebook is that of float32.
        assert cases.relative_error(found, wanted.double()) < 2**-20


def test_rocm_is_not_taken_for_an_nvidia_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its devices are called cuda, with a capability of 9 and more.
    monkeypatch.setattr(torch.version, "hip", "7.1.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 4))
    device.needs_triton.cache_clear()
    reasons = [
        w4a16.supported(bits=4, group_size=128, dtype=torch.bfloat16, device="triton"),
        w8a8.supported(dtype=torch.bfloat16, device="triton"),
        fp8a8.supported(dtype=torch.bfloat16, device="triton"),
    ]
    device.needs_triton.cache_clear()
    assert all("ROCm" in str(reason) for reason in reasons)
