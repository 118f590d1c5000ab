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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernel_surgery.kernels import project
from kernel_surgery.kernels.project import KERNELS, form_of, launch_options
from kernel_surgery.numerics.precision import STORED

# Shared memory that one block may use, in bytes (CUDA programming guide, compute capabilities 8.0 and 9.0).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
# What sm_80 and sm_90 share among the blocks of a multiprocessor: registers, threads, and shared memory with the
# kilobyte that the system takes for each block.
REGISTERS, THREADS, SHARED = 65536, 2048, {80: 164 * 1024, 90: 228 * 1024}
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
class Compiled:
    """What one compiled kernel needs: registers per thread, bytes spilled, bytes of shared memory per block.

    narrow: number of 32-bit products of a row number, a size or a stride. It must be 0, because M * d may pass 2^31.
    late_loads: number of loads after the first barrier, when the program has already waited once.
    blocks: number of blocks that fit on a multiprocessor at once. With one, nothing is loaded while it stores.
    in_flight: bytes of x that these blocks ask for before the first of them waits.
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
    blocks: int
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
    **overrides: Any,
) -> Compiled:
    """Compile `kernels/project.py` for compute capability `sm` (80 or 90), as it would be launched for x [rows, d].

    Every tensor is taken to begin at a multiple of 16 bytes. operation: a key of OPERATIONS. oblique: with a dual and
    an offset. form, overrides: replace the choice of kernel and its launch options. Raises what Triton raises for a
    kernel that does not compile.
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
    constants |= {"d": d} if form == "tile" else {"stride_basis_k": 1}
    signature = {
        **{f"{name}_ptr": f"*{element}" for name in ("x", "residual", "weight", "y", "n")},
        **{f"{name}_ptr": "*fp32" for name in ("basis", "dual", "offset", "row_strength")},
        **{"strength": "fp32", "eps": "fp32", "rows": "i32", "d": "i32", "k": "i32"},
        **{name: "i32" for name in ("stride_x", "stride_residual", "stride_basis_d")},
        **dict.fromkeys(constants, "constexpr"),
    }
    # In the order of the kernel's own parameters.
    signature = {name: signature[name] for name in KERNELS[form].arg_names}
    # What Triton specialises at launch: aligned pointers, and sizes and strides that are multiples of 16.
    even = {"d": d, "stride_x": d, "stride_residual": d, "rows": rows, "k": k, "stride_basis_d": k}
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
    used = re.search(r"Used (\d+) registers", said)
    assert used is not None, said  # ptxas -v says so
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", said)))
    late = ptx.partition("bar.sync")[2].count("ld.global")
    needs = int(used[1]), spilled, done.metadata.shared, narrow_products(done.asm["ttir"]), late
    blocks = blocks_that_fit(sm, needs[0], needs[2], 32 * launch["num_warps"])
    columns = d if form != "two-pass" else options["BLOCK_D"] * launch["num_stages"]
    if form == "row" and not options["WHOLE"]:
        columns = options["BLOCK_D"]
    asked = blocks * options.get("BLOCK_M", 1) * columns * kind.itemsize
    return Compiled(sm, operation, form, dtype, rows, d, k, oblique, *needs, blocks, asked)


def blocks_that_fit(sm: int, registers: int, shared: int, threads: int) -> int:
    """Return how many blocks a multiprocessor holds at once. Registers are given out by eights for a thread.

    Source: CUDA programming guide, technical specifications of compute capabilities 8.0 and 9.0.
    """
    for_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
    return min(for_registers, THREADS // threads, SHARED[sm] // (shared + 1024))


def kernel_sha256() -> str:
    """Return the SHA-256 of the kernels' source. A table of compiled kernels is valid for one source only."""
    return hashlib.sha256(Path(project.__file__).read_bytes()).hexdigest()
