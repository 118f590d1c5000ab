"""How many blocks share a multiprocessor, and the bytes in flight: the stored table against the hardware's rules."""

import json
from pathlib import Path

import pytest
import torch

from kernel_surgery.kernels.project import launch_options
from kernel_surgery.ops.compiled import OPERATIONS, asked_at_once
from kernel_surgery.ops.occupancy import ESTIMATE, blocks_by, bytes_needed, limit

TABLE = json.loads((Path(__file__).parents[2] / "bench" / "results" / "aot.json").read_text(encoding="utf-8"))


def resident(sm, registers, shared, warps):
    """Blocks that fit, found by placing one after another: warps in turns on the four parts of the registers."""
    whole = {80: 167936, 90: 233472}[sm]
    register_units, memory, threads, blocks = [16384 // 256] * 4, whole // 128, 2048, 0
    turn = 0
    while blocks < 32:
        for _ in range(warps):
            while register_units[turn % 4] < -(-registers * 32 // 256):
                if max(register_units) < -(-registers * 32 // 256):
                    return blocks
                turn += 1
            register_units[turn % 4] -= -(-registers * 32 // 256)
            turn += 1
        memory -= -(-(shared + 1024) // 128)
        threads -= 32 * warps
        if memory < 0 or threads < 0:
            return blocks
        blocks += 1
    return blocks


@pytest.mark.parametrize(
    "sm, registers, shared, warps, blocks, by",
    [
        (90, 128, 32768, 16, 1, "registers"),
        (90, 128, 8192, 8, 2, "registers"),
        (90, 129, 8192, 8, 1, "registers"),  # 136 for each thread: given out by eights
        (90, 104, 0, 3, 5, "registers"),  # 4 warps in each part: whole registers / (104 * 96) would be 6
        (90, 40, 0, 4, 12, "registers"),  # 5 units for each warp
        (90, 255, 0, 4, 2, "registers"),
        (90, 32, 113 * 1024, 4, 2, "shared memory"),
        (90, 32, 113 * 1024 + 1, 4, 1, "shared memory"),
        (80, 32, 81 * 1024, 4, 2, "shared memory"),
        (80, 32, 81 * 1024 + 1, 4, 1, "shared memory"),
        (90, 32, 227 * 1024, 4, 1, "shared memory"),
        (90, 32, 227 * 1024 + 1, 4, 0, "shared memory"),  # more than a block may use
        (90, 16, 0, 16, 4, "threads"),
        (90, 16, 0, 1, 32, "blocks"),
    ],
)
def test_the_blocks_of_a_multiprocessor_are_those_of_the_toolkit(sm, registers, shared, warps, blocks, by):
    """Each line is worked out by hand from the rules in the toolkit's cuda_occupancy.h."""
    allowed = blocks_by(sm, registers, shared, warps)
    assert (min(allowed.values()), limit(allowed)) == (blocks, by)
    if blocks:
        assert resident(sm, registers, shared, warps) == blocks


def test_the_stored_blocks_are_recomputed_by_placing_them():
    rows = TABLE["rows"] + TABLE["candidates"]
    for r in rows:
        assert r["blocks"] == resident(r["sm"], r["registers"], r["shared"], r["warps"]), r
        assert r["blocks_by"] == blocks_by(r["sm"], r["registers"], r["shared"], r["warps"]), r
        assert r["blocks_by"][r["limit"]] == r["blocks"] == min(r["blocks_by"].values()), r
    assert {r["limit"] for r in rows} >= {"registers"} and len({r["blocks"] for r in rows}) > 3
    for r in TABLE["rows"]:  # the warps are those that are launched
        kind, of = getattr(torch, r["dtype"]), (r["rows"], r["d"], r["k"], r["form"])
        options = launch_options(kind, *of, *OPERATIONS[r["operation"]].values(), r["oblique"])
        assert options["num_warps"] == r["warps"], r


def test_the_stored_bytes_in_flight_are_those_of_the_launch_options():
    """Recomputed for the forms whose loads the options decide. For the tile form it is what the compiler left of x."""
    pipelined = set()
    for r in TABLE["rows"]:
        kind = getattr(torch, r["dtype"])
        what = OPERATIONS[r["operation"]]
        options = launch_options(kind, r["rows"], r["d"], r["k"], r["form"], *what.values(), r["oblique"])
        if r["form"] == "two-pass":
            tile = options["BLOCK_M"] * options["BLOCK_D"] * kind.itemsize
            asked, least = (options["num_stages"] - 1) * tile, tile
            pipelined.add(options["num_stages"])
        elif r["form"] == "row":
            asked = least = r["d"] * kind.itemsize * (1 + what["ADD"])
            if not options["WHOLE"]:
                asked = least = options["BLOCK_D"] * kind.itemsize
        else:
            asked, least = options["BLOCK_M"] * r["d"] * kind.itemsize, 32 * r["warps"] * 16
        assert least * r["blocks"] <= r["in_flight"] <= asked * r["blocks"], r
        assert r["in_flight"] % (r["blocks"] * least) == 0 or r["form"] == "row"
    assert pipelined


def test_what_is_in_flight_is_read_from_the_compiled_code():
    code = """
        /*0290*/                   LDG.E.64 R10, desc[UR6][R114.64] ;
        /*0340*/              @!P2 LDG.E.128 R40, desc[UR6][R12.64] ;
        /*0350*/               @P1 LDG.E.128 R44, desc[UR6][R14.64] ;
        /*0360*/                   HMMA.16816.F32.BF16 R4, R40, R10, RZ ;
        /*0370*/              @!P2 LDG.E.128 R48, desc[UR6][R12.64] ;
    """
    tile = {"num_warps": 8, "BLOCK_M": 16}
    assert asked_at_once("tile", tile, 2048, 2, "", code) == 2 * 16 * 256  # U's load and the late one are not counted
    x = "%a = ttg.local_alloc : () -> !ttg.memdesc<{}x32x64xbf16>"
    u = "%b = ttg.local_alloc : () -> !ttg.memdesc<9x64x32xf32>"
    ir = x + u
    pass_ = {"BLOCK_M": 32, "BLOCK_D": 64}
    assert [asked_at_once("two-pass", pass_, 2048, 2, ir.format(n), "") for n in (1, 2)] == [4096, 8192]
    assert asked_at_once("two-pass", pass_, 2048, 2, "", "") == 4096  # not pipelined


def test_the_estimate_of_what_is_needed_is_stored_with_its_parts():
    needed = TABLE["estimate"]
    assert bytes_needed() == needed["bytes"] == round(4.8e12 / 132 * 700e-9)
    assert {name: needed[name] for name in ESTIMATE} == ESTIMATE and needed["device"] == "NVIDIA H200"
