"""Compiles the Triton kernel ahead of time for a GPU that is not there, and reads off what it needs.

    python -m kernel_surgery.aot            a table: registers, spills and shared memory for sm_80 and sm_90

`triton.compile` accepts a kernel that no device could launch: shared memory and spills have to be looked at. Needs no
GPU; the ptxas in Triton's wheel does the work. Not for a process with TRITON_INTERPRET set (there is nothing to
compile then).
"""

import argparse
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kernel_surgery import cli

# Shared memory that one block may use, in bytes (CUDA programming guide, compute capabilities 8.0 and 9.0).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
# (rows, d, k): each form at the ends of what it is chosen for, and where no size is a multiple of 16.
CASES = (
    *((1, 2048, 10), (1, 8192, 64), (1, 2049, 10)),
    *((16384, 2048, 10), (16384, 2048, 33), (16384, 8192, 64), (16384, 2049, 10), (16384, 2049, 33)),
)
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class Compiled:
    """What one specialisation needs: registers a thread, bytes spilled, bytes of shared memory a block; its IR."""

    sm: int
    form: str
    dtype: str
    rows: int
    d: int
    k: int
    registers: int
    spilled: int
    shared: int
    ttir: str

    def faults(self) -> list[str]:
        """Why this could not run well, or at all; empty if it can."""
        found = []
        if self.spilled:
            found.append(f"spills {self.spilled} bytes")
        if self.shared > SHARED_LIMIT[self.sm]:
            found.append(f"needs {self.shared} bytes of shared memory, sm_{self.sm} has {SHARED_LIMIT[self.sm]}")
        return found


def compile_project(
    sm: int, dtype: str, rows: int, d: int, k: int, *, form: str | None = None, per_row: bool = True, **overrides
) -> Compiled:
    """Compile `kernels/project.py` for compute capability `sm` (80 or 90) as it would be launched for x [rows, d].

    form, overrides: replace its choice of kernel and launch options. Raises what Triton raises for a kernel that does
    not compile.
    """
    import torch
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernel_surgery.kernels.project import KERNELS, form_of, launch_options

    kind = getattr(torch, dtype)
    form = form or form_of(rows)
    options = launch_options(kind, rows, d, k, form) | overrides
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    element = DTYPES[dtype]
    # stride_basis_k of a row-major basis is 1, which Triton specialises when it launches: so does this.
    constants = options | {"PER_ROW": per_row, "stride_basis_k": 1}
    signature = {
        **{"x_ptr": f"*{element}", "basis_ptr": "*fp32", "y_ptr": f"*{element}", "row_strength_ptr": "*fp32"},
        **{"strength": "fp32", "rows": "i32", "d": "i32", "k": "i32"},
        **{name: "i32" for name in ("stride_x", "stride_basis_d", "stride_y")},
        **dict.fromkeys(constants, "constexpr"),
    }
    # In the order of the kernel's own parameters.
    signature = {name: signature[name] for name in KERNELS[form].arg_names}
    # What Triton specialises at launch: aligned pointers, and sizes and strides that are multiples of 16.
    aligned = [n for n in signature if n.endswith("_ptr") or (n in ("d", "stride_x", "stride_y") and d % 16 == 0)]
    attrs = {(list(signature).index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(KERNELS[form], signature=signature, constexprs=constants, attrs=attrs)
    done = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=launch)
    ptx = done.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        # Triton compiles for sm_90a where it can; ptxas must be told what the PTX says.
        target = re.search(r"^\.target\s+(sm_\w+)", ptx, re.MULTILINE)[1]
        words = [
            knobs.nvidia.ptxas.path,
            "-v",
            f"--gpu-name={target}",
            str(file),
            "-o",
            str(Path(folder) / "kernel.cubin"),
        ]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", said)[1])
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", said)))
    return Compiled(sm, form, dtype, rows, d, k, registers, spilled, done.metadata.shared, done.asm["ttir"])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    return cli.Parser(description="Compile the Triton kernel for GPUs that are not here and show what it needs.")


def run(argv: list[str] | None = None) -> int:
    """Print the table; 1 if anything spills or does not fit."""
    parser().parse_args(argv)
    print(f"{'target':<6} {'form':<8} {'dtype':<8} {'rows':>5} {'d':>4} {'k':>2} registers spilled  shared (limit)")
    bad = False
    for sm in SHARED_LIMIT:
        for dtype in DTYPES:
            for rows, d, k in CASES:
                c = compile_project(sm, dtype, rows, d, k)
                bad |= bool(c.faults())
                print(
                    f"sm_{sm:<3} {c.form:<8} {dtype:<8} {rows:>5} {d:>4} {k:>2} {c.registers:>9} {c.spilled:>7} "
                    f"{c.shared:>7} ({SHARED_LIMIT[sm]}) {' '.join(c.faults())}".rstrip(),
                    flush=True,
                )
    return 1 if bad else 0


if __name__ == "__main__":
    cli.main(run)
