"""Compile the Triton kernels ahead of time for a GPU that is not present, and report what they need.

    python -m kernel_surgery.aot [--out FILE]     registers, spills and shared memory for sm_80 and sm_90

`triton.compile` accepts kernels that no device could launch. So shared memory and spills are checked, and that no row
number or stride is multiplied in 32 bits. No GPU is needed: the ptxas in Triton's wheel compiles. TRITON_INTERPRET must
not be set, because nothing is compiled then.
"""

import hashlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernel_surgery.kernels import project
from kernel_surgery.kernels.project import KERNELS, form_of, launch_options
from kernel_surgery.numerics.precision import STORED
from kernel_surgery.ops.occupancy import SHARED_LIMIT, blocks_by, limit

# Bytes that may spill: a few registers, stored once and read once. Two tiles of rows a program spill 8, and are 12%
# faster than one tile that spills nothing (H100, 16384 x 2048).
MAY_SPILL = 16
# (rows, d, k): each form at the ends of what it is chosen for, and where no size is a multiple of 16.
CASES = (
    *((1, 2048, 16), (1, 896, 16), (1, 4096, 16), (1, 2048, 64), (1, 8192, 64)),
    *((1, 2048, 10), (1, 256, 10), (1, 2049, 10), (1, 2049, 33)),
    *((16384, 896, 16), (16384, 2048, 16), (16384, 2048, 32), (16384, 2560, 16), (16384, 4096, 16)),
    *((16384, 2048, 10), (16384, 2048, 33), (16384, 8192, 64), (16384, 2049, 10), (16384, 2049, 33)),
)
# With a dual and an offset: one of each form, where it takes the most registers.
OBLIQUE_CASES = ((1, 2048, 16), (1, 896, 16), (1, 2049, 33), (16384, 2048, 16), (16384, 2560, 16), (16384, 2049, 33))
# What is computed: the projection, with the residual added, and normalised too.
OPERATIONS = {
    "project": {"ADD": False, "NORM": False},
    "project_add": {"ADD": True, "NORM": False},
    "project_add_rmsnorm": {"ADD": True, "NORM": True},
}


@dataclass(frozen=True)
class Candidate:
    """Launch options that let at least two blocks share a multiprocessor, where those that ship let one.

    They spill nothing on sm_90, and change no bit of a row beside the other options of their form but for the order of
    a sum. None is measured: `bench.tune` times them on a GPU. shape: (rows, d, k padded).
    """

    form: str
    shape: tuple[int, int, int]
    operations: tuple[str, ...]
    options: dict[str, Any]

    def compiled(self) -> Iterator["Compiled"]:
        """Compile it for sm_90 and bfloat16, once for each operation."""
        for operation in self.operations:
            yield compile_project(90, "bfloat16", *self.shape, operation, form=self.form, **self.options)


def tile_candidate(d: int, warps: int, operations: tuple[str, ...], **options: Any) -> Candidate:
    """Return a candidate of the tile form: 16 rows per block, and the registers of two blocks."""
    launch = {"WARPS": warps, "num_warps": warps, "TILES": 1, "maxnreg": min(255, 1024 // warps)}
    return Candidate("tile", (16384, d, 16), operations, launch | {"KEEP": False} | options)


# The norm at d = 2560 has none: eight warps spill 156 bytes.
CANDIDATES = (
    *(tile_candidate(d, 8, ("project", "project_add"), PREPARED=True) for d in (2048, 2560)),
    *(tile_candidate(d, 8, ("project",)) for d in (2048, 2560)),
    tile_candidate(2048, 4, ("project", "project_add"), PREPARED=True),
    tile_candidate(2048, 8, ("project_add",)),
    tile_candidate(2048, 4, ("project_add_rmsnorm",)),
    *(
        Candidate("two-pass", (16384, 2048, 32), ("project_add_rmsnorm",), options)
        for options in ({"BLOCK_M": 16}, {"BLOCK_M": 16, "num_stages": 3}, {"num_warps": 4})
    ),
    Candidate("row", (1, 2048, 16), ("project", "project_add_rmsnorm"), {"BLOCK_D": 1024, "num_warps": 4}),
)


@dataclass(frozen=True)
class Compiled:
    """What one compiled kernel needs: registers per thread, bytes spilled, bytes of shared memory per block.

    narrow: number of 32-bit products of a row number, a size or a stride. It must be 0, because M * d may pass 2^31.
    late_loads: number of loads after the first barrier, when the program has already waited once.
    warps: per block. blocks_by: how many blocks each resource allows at once (see `occupancy`). blocks: the fewest of
    these, which are resident at once. limit: the resource that allows the fewest.
    in_flight: bytes that the resident blocks have asked for when they first wait for memory (see `asked_at_once`).
    """

    sm: int
    operation: str
    form: str
    dtype: str
    rows: int
    d: int
    k: int
    oblique: bool
    registers: int
    spilled: int
    shared: int
    narrow: int
    late_loads: int
    warps: int
    blocks_by: dict[str, int]
    blocks: int
    limit: str
    in_flight: int

    def faults(self) -> list[str]:
        """Return the reasons why it cannot run, or cannot run well. The list is empty if it can."""
        found = []
        if self.spilled > MAY_SPILL:
            found.append(f"spills {self.spilled} bytes")
        if self.shared > SHARED_LIMIT[self.sm]:
            found.append(f"needs {self.shared} bytes of shared memory, sm_{self.sm} has {SHARED_LIMIT[self.sm]}")
        if self.narrow:
            found.append(f"multiplies rows or strides in 32 bits, {self.narrow} times")
        return found


def narrow_products(ttir: str) -> int:
    """Count the 32-bit products in Triton's IR of anything derived from a program id or an integer argument.

    Products of columns alone are bounded by d * k and may be 32 bits wide.
    """
    tainted = set(re.findall(r"(%\w+): i32", ttir))
    count = 0
    for name, operation, rest in re.findall(r"(%\w+)(?::\d+)? = ([\w.]+) (.*)", ttir):
        of_rows = operation == "tt.get_program_id" or any(used in tainted for used in re.findall(r"%\w+", rest))
        kind = re.sub(r"\s*loc\(.*", "", rest).rsplit(":", 1)[-1].rsplit("->", 1)[-1]
        if not of_rows or not re.search(r"\bi32|xi32", kind):
            continue
        tainted.add(name)
        count += operation == "arith.muli"
    return count


def compile_project(
    sm: int,
    dtype: str,
    rows: int,
    d: int,
    k: int,
    operation: str = "project",
    *,
    form: str | None = None,
    oblique: bool = False,
    per_row: bool = True,
    separate: bool = True,
    across: bool = False,
    **overrides: Any,
) -> Compiled:
    """Compile `kernels/project.py` for compute capability `sm` (80 or 90), as it would be launched for x [rows, d].

    Every tensor is taken to begin at a multiple of 16 bytes. operation: a key of OPERATIONS. oblique: with a dual and
    an offset. across: the basis is stored column by column. form, overrides: replace the choice of kernel and its
    launch options. Raises what Triton raises for a kernel that does not compile.
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kind = getattr(torch, dtype)
    form = form or form_of(kind, rows, d, k)
    add, norm = OPERATIONS[operation].values()
    options = launch_options(kind, rows, d, k, form, add, norm, oblique, **overrides)
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in options}
    element = STORED[dtype].triton
    constants = options | OPERATIONS[operation] | {"PER_ROW": per_row, "SEPARATE": separate}
    constants |= {"DUAL": oblique, "OFFSET": oblique}
    # A row-major basis has stride_basis_k = 1, for which Triton compiles a special kernel at launch. So does this.
    if form == "tile":
        constants["d"] = d
    else:
        constants["stride_basis_d" if across else "stride_basis_k"] = 1
    signature = {
        **{f"{name}_ptr": f"*{element}" for name in ("x", "residual", "weight", "y", "n")},
        **{f"{name}_ptr": "*fp32" for name in ("offset", "row_strength")},
        **{f"{name}_ptr": f"*{element}" if options.get("PREPARED") else "*fp32" for name in ("basis", "dual")},
        **{"strength": "fp32", "eps": "fp32", "rows": "i32", "d": "i32", "k": "i32"},
        **{name: "i32" for name in ("stride_x", "stride_residual", "stride_basis_d", "stride_basis_k")},
        **dict.fromkeys(constants, "constexpr"),
    }
    # In the order of the kernel's own parameters.
    signature = {name: signature[name] for name in KERNELS[form].arg_names}
    # What Triton specialises at launch: aligned pointers, and sizes and strides that are multiples of 16.
    even = {"d": d, "stride_x": d, "stride_residual": d, "rows": rows, "k": k, "stride_basis_d": k, "stride_basis_k": d}
    aligned = [n for n in signature if n not in constants and (n.endswith("_ptr") or even.get(n, 1) % 16 == 0)]
    attrs = {(list(signature).index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(KERNELS[form], signature=signature, constexprs=constants, attrs=attrs)
    done = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=launch)
    ptx = done.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        # Triton may compile for sm_90a. ptxas must get the target that the PTX names.
        target = re.search(r"^\.target\s+(sm_\w+)", ptx, re.MULTILINE)
        assert target is not None  # every PTX names it
        words = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={target[1]}", file, "-o", Path(folder) / "kernel.cubin"]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stderr
        words = [knobs.nvidia.nvdisasm.path, "-c", Path(folder) / "kernel.cubin"]
        code = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    used = re.search(r"Used (\d+) registers", said)
    assert used is not None, said  # ptxas -v says so
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", said)))
    late = ptx.partition("bar.sync")[2].count("ld.global")
    needs = int(used[1]), spilled, done.metadata.shared, narrow_products(done.asm["ttir"]), late
    allowed = blocks_by(sm, needs[0], needs[2], launch["num_warps"])
    asked = asked_at_once(form, options | OPERATIONS[operation] | launch, d, kind.itemsize, done.asm["ttgir"], code)
    blocks = min(allowed.values())
    fits = launch["num_warps"], allowed, blocks, limit(allowed), blocks * asked
    return Compiled(sm, operation, form, dtype, rows, d, k, oblique, *needs, *fits)


def asked_at_once(form: str, options: dict, d: int, size: int, ttgir: str, code: str) -> int:
    """Return how many bytes a block has asked for when it first waits for memory. U is not counted: it is in the cache.

    options: the form's constants and launch options. size: bytes of an element of x. ttgir: the kernel in Triton's IR
    for GPUs. code: in machine code, as nvdisasm prints it.

    row         x, and with ADD the residual, if the row is read whole; else one chunk of x
    tile        the loads of x that the machine code has before the first product. The compiler moves some behind it
    two-pass    a pipelined loop has a buffer of [BLOCK_M, BLOCK_D] for each load that may be outstanding: one less than
                num_stages. Elements that cannot be copied past the registers (rows that begin at odd multiples of 2
                bytes) are not pipelined, and one load is outstanding
    """
    if form == "tile":  # x alone is read under a predicate there: the last rows may be missing
        loads = re.findall(r"@!?U?P\d+ LDG\S*\.(64|128)\b", code.partition("HMMA")[0])
        return sum(map(int, loads)) // 8 * 32 * options["num_warps"]
    if form == "row":
        return (d * (2 if options["ADD"] else 1) if options["WHOLE"] else options["BLOCK_D"]) * size
    shape = f"{options['BLOCK_M']}x{options['BLOCK_D']}x"
    buffers = re.findall(rf"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x{shape}", ttgir)
    return max(map(int, buffers), default=1) * options["BLOCK_M"] * options["BLOCK_D"] * size


def kernel_sha256() -> str:
    """Return the SHA-256 of the kernels' source. A table of compiled kernels is valid for one source only."""
    return hashlib.sha256(Path(project.__file__).read_bytes()).hexdigest()
