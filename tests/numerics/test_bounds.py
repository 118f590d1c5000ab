"""The bounds themselves: right arithmetic is inside them, each plausible fault outside, and NaN is never inside."""

import math

import pytest
import torch

from kernel_surgery.numerics.bounds import baked_element_bound, leak_bound, leak_floor, rule_a_bound, worst_ratio
from kernel_surgery.numerics.oracle import bake_oracle, leak, leak_of_weight, project_oracle
from kernel_surgery.numerics.rounding import storage_noise, storage_noise_at_most, unit_roundoff
from kernel_surgery.ops.eager import project_eager
from tests.support.models import basis


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_unit_roundoff_is_half_of_eps(dtype):
    assert unit_roundoff(dtype) == torch.finfo(dtype).eps / 2


def test_an_unknown_dtype_is_refused():
    with pytest.raises(TypeError, match="int8"):
        unit_roundoff(torch.int8)


def test_the_oracle_projects():
    u, x = torch.linalg.qr(torch.randn(20, 4, dtype=torch.float64))[0], torch.randn(7, 20, dtype=torch.float64)
    # Two products over d and k, an addition, and as much again for U's own orthonormality, each in units of 2^-53.
    room = 2 * (20 + 4 + 2) * 2**-53 * float(x.norm(dim=1).max())
    y = project_oracle(x, u)
    assert float((y @ u).abs().max()) <= room
    assert float((project_oracle(y, u) - y).abs().max()) <= room  # a second time changes nothing
    assert float((project_oracle(x, u, 2.0).norm(dim=1) - x.norm(dim=1)).abs().max()) <= 2 * room  # reflection
    rows = project_oracle(x, u, torch.linspace(0, 2, 7, dtype=torch.float64))
    assert torch.equal(rows[0], x[0])
    assert float((rows[-1] - project_oracle(x[-1:], u, 2.0)[0]).abs().max()) <= 2 * room
    assert float((y - x).abs().max()) > 0.1  # the room is far smaller than what is removed


def test_rule_a_admits_two_pieces_and_rejects_one():
    u, x = basis(512, 10), torch.randn(8, 512).bfloat16()
    inside = (torch.randn(8, 10) @ u.T).bfloat16()
    for rows in (x, inside):
        assert (
            worst_ratio((project_eager(rows, u).double() - project_oracle(rows, u)).abs(), rule_a_bound(rows, u)) <= 1
        )
    z = inside.float() @ u
    for pieces, good in ((2, True), (1, False)):
        high = z.bfloat16().float()
        low = (z - high).bfloat16().float() if pieces == 2 else 0.0
        y = (inside.float() - (high + low) @ u.T).bfloat16()
        error = worst_ratio((y.double() - project_oracle(inside, u)).abs(), rule_a_bound(inside, u))
        kept = worst_ratio(leak(y, u), leak_bound(y, inside, u))
        print(f"z in {pieces} pieces: error/bound {error:.2f}, leak/bound {kept:.2f}")
        assert (error <= 1) == (kept <= 1) == good


def test_the_leak_floor_is_what_rounding_leaves():
    torch.manual_seed(1)
    weight, u = torch.randn(1024, 768).bfloat16(), basis(1024, 10)
    exact = bake_oracle(weight, u)
    rounded = exact.to(torch.bfloat16)
    kept, floor = leak_of_weight(rounded, weight, u), leak_floor(rounded, weight, u)
    print(f"leak {kept:.3e}, floor {floor:.3e}, ratio {kept / floor:.3f}")
    assert 0.9 < kept / floor < 1.1
    assert worst_ratio((rounded.double() - exact).abs(), baked_element_bound(weight, u)) <= 1
    assert leak_of_weight(weight, weight, u) == 1.0
    # What is left of an exact projection is what the float32 basis lacks of orthonormality.
    skew = float(torch.linalg.matrix_norm(u.double().T @ u.double() - torch.eye(10, dtype=torch.float64), 2))
    assert leak_of_weight(exact, weight, u) <= 1.01 * skew < floor / 100
    # At another strength, what should stay is not counted as a leak.
    half = bake_oracle(weight, u, 0.5)
    assert leak_of_weight(half, weight, u, 0.5) <= skew and leak_of_weight(half, weight, u, 1.0) >= 0.5 - skew


def test_a_ratio_never_hides_nan_or_an_error_without_a_bound():
    zero, one, nan = torch.zeros(2), torch.ones(2), torch.tensor([0.0, math.nan])
    assert worst_ratio(zero, zero) == 0 and worst_ratio(one, 2 * one) == 0.5 and worst_ratio(zero[:0], zero[:0]) == 0
    assert worst_ratio(one, zero) == worst_ratio(nan, one) == worst_ratio(one, nan) == math.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-7, 0.0])
def test_the_cheap_bound_of_the_storage_noise_is_one_and_is_near(dtype, scale):
    """An ulp is between u and 2 u of its number: the bound is at most twice too large where nothing is subnormal."""
    weight = (scale * torch.randn(300, 70)).to(dtype)
    weight[3, :5] = 0.0
    noise, bound = storage_noise(weight, basis(300, 7)), storage_noise_at_most(weight, basis(300, 7))
    print(f"{dtype} x {scale}: bound/noise {bound / noise if noise else math.inf:.2f}")
    assert bound >= noise
    assert bound <= 2.05 * noise or scale < 1e-3


@pytest.mark.parametrize("rows", [255, 256, 257, 700])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_weight_is_baked_some_rows_at_a_time_within_the_bound_of_the_whole(dtype, rows):
    from kernel_surgery.edit.baked import ROWS_AT_ONCE, remove

    weight, u = torch.randn(rows, 90).to(dtype), basis(rows, 7)
    assert ROWS_AT_ONCE == 256
    for given in (weight, weight.T.contiguous().T, weight[:, 3]):
        kept = given.clone()
        made, inside = remove(given, u, 0.7)
        columns = given.reshape(rows, -1)
        off = (made.reshape(rows, -1).double() - bake_oracle(columns, u, 0.7)).abs()
        assert made.shape == given.shape and made.dtype == dtype and torch.equal(given, kept)
        assert worst_ratio(off, baked_element_bound(columns, u, 0.7)) <= 1
        assert (inside.double() - u.double().T @ columns.double()).norm() <= 1e-5 * inside.double().norm()
