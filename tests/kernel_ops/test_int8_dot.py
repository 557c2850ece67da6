"""quantkit::int8_dot, compiled here, against its reference and float64."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import kernel_cases as cases
import pytest
import torch
from quantkit_kernels.cpu import isa, native
from quantkit_kernels.ops import int8_dot
from quantkit_kernels.ops.codebook import NF4

from quantkit.numbers.grid import E2M1_VALUES, FP4_VALUES

ROOT = Path(__file__).parent.parent.parent
ROUNDING = {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(autouse=True, scope="module")
def built() -> None:
    if reason := int8_dot.unavailable():
        pytest.skip(reason)


def run(x: torch.Tensor, weight: int8_dot.Packed, bias: Any, rows: int) -> Any:
    parts = (weight.packed, weight.scale, weight.zero, weight.table)
    numbers = (weight.bits, weight.floats, weight.group_size)
    return torch.ops.quantkit.int8_dot(x, *parts, bias, *numbers, rows)


def plain(x: torch.Tensor, weight: int8_dot.Packed, bias: Any, rows: int) -> Any:
    parts = (weight.packed, weight.scale, weight.zero, weight.table)
    numbers = (weight.bits, weight.floats, weight.group_size)
    return int8_dot.reference(x, *parts, bias, *numbers, rows)


@pytest.mark.parametrize("asym", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("group", [16, 32, 64, 128, None], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_the_compiled_op_equals_the_reference(bits: int, group: int | None, asym: bool) -> None:
    # An odd number of groups of 16: the last block has one.
    shape = (37, 368 if group == 16 else 384 if group else 333)
    codes, scale, zero = cases.int_weight(shape, group, bits=bits, asym=asym)
    weight = int8_dot.pack(codes, scale, zero, group, bits)
    for dtype, rounding in ROUNDING.items():
        bias = torch.randn(shape[0]).to(dtype)
        for rows in (0, 1, 3, 4, 5, 17, 64):
            x = cases.activations((rows, shape[1]), dtype, seed=rows)
            found = run(x, weight, bias, shape[0])
            assert found.dtype == dtype and found.shape == (rows, shape[0])
            if rows:
                wanted = plain(x.float(), weight, bias.float(), shape[0])
                assert cases.relative_error(found, wanted) < rounding


@pytest.mark.parametrize(
    ("values", "group"),
    [(values, group) for values in (NF4, FP4_VALUES, E2M1_VALUES) for group in (32, 64)]
    + [(E2M1_VALUES, 16)],
    ids=["nf4-32", "nf4-64", "fp4-32", "fp4-64", "e2m1-32", "e2m1-64", "e2m1-16"],
)
def test_codebooks_equal_the_reference_and_their_values(
    values: tuple[float, ...], group: int
) -> None:
    codes, scale, _ = cases.int_weight((37, 384), group)
    weight = int8_dot.pack_codebook(codes, scale / 3, values, group)
    assert torch.equal(int8_dot.unpack(weight.packed, (37, 384)), codes)
    table = torch.tensor(values, dtype=torch.float64)
    decoded = table[codes.long()] * (scale / 3).double().repeat_interleave(group, dim=1)
    for rows in (1, 3, 5, 17):
        x = cases.activations((rows, 384), torch.float32, seed=rows)
        found = run(x, weight, None, 37)
        assert cases.relative_error(found, plain(x, weight, None, 37)) < 2**-18
        rounded, scales = int8_dot.round_activations(x)
        y = (rounded.double() * scales.double()[..., None]).flatten(1)
        # NF4's values within half a step of 1/8191 of the largest; the others are exact.
        limit = 2**-12 if values is NF4 else 2**-18
        assert cases.relative_error(found, cases.expected(y, decoded)) < limit
    nothing = torch.full_like(codes, values.index(0.0))
    weight = int8_dot.pack_codebook(nothing, scale, values, group)
    assert (run(x, weight, None, 37) == 0).all()
    largest = torch.full_like(codes, int(table.abs().argmax()))
    weight = int8_dot.pack_codebook(largest, scale, values, group)
    x = torch.full((1, 384), 5.0)
    found, wanted = run(x, weight, None, 37), plain(x, weight, None, 37)
    assert cases.relative_error(found, wanted) < 2**-20


@pytest.mark.parametrize("group", [32, None])
def test_every_e4m3_number_equals_the_reference_and_its_value(group: int | None) -> None:
    finite = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    shuffled = torch.randperm(37 * 384, generator=torch.Generator().manual_seed(1)) % len(finite)
    codes = finite[shuffled].view(37, 384)
    scale = torch.rand(37, 384 // group if group else 1) + 0.1
    weight = int8_dot.pack_floats(codes, scale, group)
    assert torch.equal(int8_dot.unpack(weight.packed, (37, 384)), codes)
    parts = (weight.packed, weight.scale, None, None, 8, True, weight.group_size, (37, 384))
    decoded = int8_dot.dequantize(*parts)
    spread = scale.repeat_interleave(group or 384, dim=1)
    exact = codes.view(torch.float8_e4m3fn).float() * spread
    large = exact.abs() >= spread / 2
    assert large.any() and torch.equal(decoded[large], exact[large])
    assert ((decoded - exact).abs() <= spread / 31.99).all()
    for dtype, rounding in ROUNDING.items():
        for rows in (1, 3, 5, 17):
            x = cases.activations((rows, 384), dtype, seed=rows)
            found, wanted = run(x, weight, None, 37), plain(x.float(), weight, None, 37)
            assert cases.relative_error(found, wanted) < rounding
    # One number at a time: every code in every place of a block.
    x = torch.eye(32)
    for first in range(0, len(finite), 8):
        eight = finite[(torch.arange(8) + first) % len(finite)]
        one = int8_dot.pack_floats(eight[:, None].expand(8, 32), torch.ones(8, 1), None)
        assert torch.equal(run(x, one, None, 8), plain(x, one, None, 8))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_only_rounding_the_activations_is_lost(bits: int) -> None:
    codes, scale, zero = cases.int_weight((64, 512), 64, bits=bits, asym=True)
    weight = int8_dot.pack(codes, scale, zero, 64, bits)
    x = cases.activations((5, 512), torch.float32)
    wanted = cases.expected(x, cases.decoded(codes, scale, zero, bits=bits))
    found = run(x, weight, None, 64)
    # A uniform error of half a step, 1/254 of a block's largest value, in each of 512 products.
    assert 1e-4 < cases.relative_error(found, wanted) < 1e-2
    rounded, scales = int8_dot.round_activations(x)
    decoded = (rounded.double() * scales.double()[..., None]).flatten(1)
    assert ((decoded - x.double()).abs().view(5, -1, 32) <= scales.double()[..., None] / 1.99).all()
    exact = cases.expected(decoded, cases.decoded(codes, scale, zero, bits=bits))
    assert cases.relative_error(found, exact) < 2**-20


@pytest.mark.parametrize("extreme", ["codes", "activations"])
@pytest.mark.parametrize("bits", [4, 8])
def test_sums_of_the_largest_products_do_not_overflow(bits: int, extreme: str) -> None:
    codes = torch.full((8, 64), 2**bits - 1, dtype=torch.uint8)
    if extreme == "activations":
        codes[:, ::2] = 0
    x = torch.ones(1, 64) * 3
    x[:, 1::2] *= -1 if extreme == "activations" else 1
    scale, zero = torch.ones(8, 1), torch.zeros(8, 1, dtype=torch.uint8)
    weight = int8_dot.pack(codes, scale, zero, None, bits)
    found = run(x, weight, None, 8)
    assert torch.equal(found, plain(x, weight, None, 8))


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_packing_has_an_inverse(bits: int) -> None:
    codes, scale, _ = cases.int_weight((37, 333), None, bits=bits)
    weight = int8_dot.pack(codes, scale, None, None, bits)
    assert torch.equal(int8_dot.unpack(weight.packed, (37, 333)), codes)


def test_scales_are_kept_exactly_in_the_fewest_bits() -> None:
    codes, scale, _ = cases.int_weight((16, 64), 32)
    for value, dtype in ((scale, torch.bfloat16), (scale / 3, torch.float32)):
        assert int8_dot.pack(codes, value, None, 32, 4).scale.dtype == dtype
    half = (scale / 3).half().float()
    weight = int8_dot.pack(codes, half, None, 32, 4)
    assert weight.scale.dtype == torch.float16
    x = cases.activations((2, 64), torch.float32)
    found = run(x, weight, None, 16)
    assert cases.relative_error(found, plain(x, weight, None, 16)) < 2**-20


def test_shapes_and_strides_of_activations() -> None:
    codes, scale, _ = cases.int_weight((9, 96), 32)
    weight = int8_dot.pack(codes, scale, None, 32, 4)
    x = cases.activations((2, 96, 5), torch.bfloat16).transpose(1, 2)
    found = run(x, weight, None, 9)
    assert found.shape == (2, 5, 9) and found.is_contiguous()
    assert torch.equal(found, run(x.contiguous(), weight, None, 9))
    assert run(x[0, 0], weight, None, 9).shape == (9,)
    with pytest.raises(RuntimeError, match="x has 64 columns, the weight 3 blocks of 32"):
        run(x[..., :64], weight, None, 9)
    with pytest.raises(RuntimeError, match="x must be float32, bfloat16 or float16"):
        run(x.double(), weight, None, 9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_activations_that_are_no_numbers_show_in_the_result(bad: float) -> None:
    codes, scale, _ = cases.int_weight((8, 64), 32)
    weight = int8_dot.pack(codes, scale, None, 32, 4)
    x = cases.activations((2, 64), torch.bfloat16)
    for column in (0, 13, 63):
        y = x.clone()
        y[1, column] = bad
        found = run(y, weight, None, 8)
        assert not found[1].isfinite().any()
        assert torch.equal(found[0], run(x, weight, None, 8)[0])


def test_zeros_and_denormal_activations() -> None:
    codes, scale, _ = cases.int_weight((8, 64), 32)
    weight = int8_dot.pack(codes, scale, None, 32, 4)
    for value in (0.0, 1e-40):
        assert (run(torch.full((1, 64), value), weight, None, 8) == 0).all()


def test_what_does_not_fit_together_is_refused() -> None:
    codes, scale, zero = cases.int_weight((9, 96), 32, asym=True)
    weight = int8_dot.pack(codes, scale, zero, 32, 4)
    x = cases.activations((2, 96), torch.float32)
    parts = [x, weight.packed, weight.scale, weight.zero, None, None, 4, False, 32, 9]
    assert weight.zero is not None
    for place, value, word in (
        (0, torch.randn(2, 0), "x has 0 columns"),
        (1, weight.packed[:, :, :64], "packed is not what"),
        (1, weight.packed.flatten(), "packed has 1 dimensions"),
        (2, weight.scale.double(), "scale must be"),
        # As many numbers, but what is read by the place of a group would lie behind them.
        (2, weight.scale.view(1, 6, 8), "scale must be"),
        (2, weight.scale.view(6, 1, 8), "scale must be"),
        (2, weight.scale.flatten(), "scale must be"),
        (3, weight.zero.view(6, 8), "zero must be"),
        (3, weight.zero[:1], "zero must be"),
        (4, torch.zeros(16, dtype=torch.uint8), "table must be"),
        (5, torch.zeros(2), "bias must have 9 numbers"),
        (6, 3, "3 bits"),
        (7, True, "floats have 8 bits"),
        (8, 24, "groups of 24"),
        (8, 16, "scale must be"),
        (9, 24, "for 24 rows"),
    ):
        wrong = [*parts[:place], value, *parts[place + 1 :]]
        with pytest.raises(RuntimeError, match=word):
            torch.ops.quantkit.int8_dot(*wrong)


def test_a_library_that_was_cut_short_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []

    def build(source: Path, library: Path, *rest: object) -> None:
        library.parent.mkdir(exist_ok=True)
        built.append(library)
        library.write_bytes(b"cut")

    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "_build", build)
    native.load.cache_clear()
    reason = native.load("int8_dot")
    native.load.cache_clear()
    assert len(built) == 2 and "does not load: " in str(reason) and "file too short" in str(reason)


def test_the_op_is_well_formed() -> None:
    codes, scale, zero = cases.int_weight((16, 64), 32, asym=True)
    weight = int8_dot.pack(codes, scale, zero, 32, 4)
    x = cases.activations((3, 64), torch.bfloat16)
    parts = (weight.packed, weight.scale, weight.zero, None)
    arguments = (x, *parts, torch.randn(16), 4, False, weight.group_size, 16)
    torch.library.opcheck(torch.ops.quantkit.int8_dot, arguments)


@pytest.mark.parametrize("processor", ["haswell", "icelake-server", "alderlake"])
def test_the_source_compiles_for_processors_that_are_not_here(processor: str) -> None:
    # AVX2 alone, and VNNI in its two spellings.
    compiler = native._compiler()
    assert isinstance(compiler, list)
    include = Path(torch.__file__).parent / "include"
    source = Path(native.__file__).with_name("int8_dot.cpp")
    command = [*compiler, "-std=c++20", "-Wall", "-Werror", "-fsyntax-only", f"-march={processor}"]
    command += ["-isystem", str(include), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str) -> str:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", compiler)
    native.load.cache_clear()
    reason = native.load("int8_dot")
    native.load.cache_clear()
    assert reason is not None
    assert list((tmp_path / "cache").glob("**/*")) == []
    return reason


def test_a_folder_that_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "file" / "cache"))
    native.load.cache_clear()
    reason = native.load("int8_dot")
    native.load.cache_clear()
    assert "Not a directory" in str(reason) and "another folder in $QUANTKIT_CACHE" in str(reason)


def test_no_compiler_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = refused(tmp_path, monkeypatch, "/no/such/compiler -m64")
    assert "$CXX names '/no/such/compiler', which is no program" in reason
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "install g++ or clang++" in refused(tmp_path, monkeypatch, "")


def test_a_program_that_cannot_run_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "c++"
    broken.write_text("no program\n")
    broken.chmod(0o755)
    assert "Exec format error" in refused(tmp_path, monkeypatch, str(broken))


def test_what_the_compiler_says_is_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "c++"
    fake.write_text("#!/bin/sh\n[ $1 = --version ] || { echo 'x: fatal error: no' >&2; exit 1; }\n")
    fake.chmod(0o755)
    assert "fatal error: no" in refused(tmp_path, monkeypatch, str(fake))


def test_a_compiler_that_does_not_end_is_stopped_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "c++"
    slow.write_text("#!/bin/sh\n[ $1 = --version ] || sleep 1000\n")
    slow.chmod(0o755)
    # --version has the same limit, and a busy machine takes its time to start a shell.
    monkeypatch.setattr(native, "_SECONDS", 3.0)
    assert "did not end in 3 s" in refused(tmp_path, monkeypatch, str(slow))


def test_no_home_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("QUANTKIT_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    native.load.cache_clear()
    reason = native.load("int8_dot")
    native.load.cache_clear()
    assert "there is no home folder" in str(reason) and "$QUANTKIT_CACHE" in str(reason)


def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library that is there already, under the name that ours would have."""
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    compiler = native._compiler()
    assert isinstance(compiler, list)
    path = native._library_path(Path(native.__file__).with_name("int8_dot.cpp"), compiler, ())
    path.parent.mkdir(mode=0o700)
    path.write_bytes(b"")
    path.chmod(0o700)
    return path


def reason_of(monkeypatch: pytest.MonkeyPatch) -> str:
    def no_library(path: str) -> None:
        raise AssertionError(f"{path} was loaded")

    monkeypatch.setattr(torch.ops, "load_library", no_library)
    native.load.cache_clear()
    reason = native.load("int8_dot")
    native.load.cache_clear()
    return str(reason)


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
@pytest.mark.parametrize("where", ["file", "folder"])
def test_compiled_code_that_others_can_write_is_not_run(
    where: str, mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = planted(tmp_path, monkeypatch)
    (path if where == "file" else path.parent).chmod(mode)
    reason = reason_of(monkeypatch)
    assert f"may be written by others (mode {mode:o})" in reason and "not run" in reason


@pytest.mark.parametrize("where", ["file", "folder"])
def test_compiled_code_of_others_is_not_run(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = planted(tmp_path, monkeypatch)
    owned = (path if where == "file" else path.parent).stat
    other = os.stat_result((*owned()[:4], 12345, *owned()[5:]))
    plain, name = Path.stat, path.name if where == "file" else path.parent.name
    monkeypatch.setattr(
        Path, "stat", lambda self, **how: other if self.name == name else plain(self, **how)
    )
    assert "belongs to user 12345: what others compiled is not run" in reason_of(monkeypatch)


def test_what_is_built_belongs_to_the_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "c++"
    fake.write_text(
        "#!/bin/sh\n[ $1 = --version ] && exit\n"
        'while [ "$1" != -o ]; do shift; done\n: > "$2"; chmod 777 "$2"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    native.load.cache_clear()
    reason = native.load("int8_dot")
    native.load.cache_clear()
    assert reason is None
    (library,) = (tmp_path / "cache").iterdir()
    assert [oct(one.stat().st_mode & 0o777) for one in (library, library.parent)] == ["0o700"] * 2


def test_other_processors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "level", lambda: "default")
    assert "AVX2" in str(int8_dot.supported(bits=4, group_size=32, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("bits", "group", "dtype", "word"),
    [(1, 32, torch.bfloat16, "1-bit"), (4, 24, torch.bfloat16, "group size 24"),
     (4, 32, torch.float64, "float64")],
)  # fmt: skip
def test_weights_it_cannot_take(bits: int, group: int, dtype: torch.dtype, word: str) -> None:
    assert word in str(int8_dot.supported(bits=bits, group_size=group, dtype=dtype))
