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
MAX_REGISTERS = 255
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class Compiled:
    """What one specialisation needs: registers a thread, bytes spilled, bytes of shared memory a block; its IR."""

    sm: int
    dtype: str
    k: int
    rows: int
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
        if self.registers > MAX_REGISTERS:
            found.append(f"needs {self.registers} registers, there are {MAX_REGISTERS}")
        return found


def _ptxas() -> str:
    import triton

    for name in ("ptxas", "ptxas-blackwell"):
        path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        if path.is_file():
            return str(path)
    raise cli.UserError("this Triton carries no ptxas: nothing can be compiled ahead of time.")


def compile_project(sm: int, dtype: str, k: int, rows: int, *, per_row: bool = True, **overrides) -> Compiled:
    """Compile `kernels/project.py` for compute capability `sm` (80 or 90) as `launch_options` would launch it.

    overrides: launch options that replace its choice. Raises what Triton raises for a kernel that does not compile.
    """
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernel_surgery.kernels.project import _project_kernel, launch_options

    options = launch_options(getattr(torch, dtype), rows, k) | overrides
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    element = DTYPES[dtype]
    signature = {
        **{"x_ptr": f"*{element}", "basis_ptr": "*fp32", "y_ptr": f"*{element}", "row_strength_ptr": "*fp32"},
        **{"strength": "fp32", "rows": "i32", "d": "i32", "k": "i32"},
        **{name: "i32" for name in ("stride_x", "stride_basis_d", "stride_basis_k", "stride_y")},
        **{name: "constexpr" for name in (*options, "PER_ROW")},
    }
    # stride_basis_k of a row-major basis is 1, which Triton specialises when it launches: so does this.
    constants = options | {"PER_ROW": per_row, "stride_basis_k": 1}
    signature["stride_basis_k"] = "constexpr"
    source = ASTSource(_project_kernel, signature=signature, constexprs=constants)
    done = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=launch)
    ptx = done.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        # Triton compiles for sm_90a where it can; ptxas must be told what the PTX says.
        target = re.search(r"^\.target\s+(sm_\w+)", ptx, re.MULTILINE)[1]
        words = [_ptxas(), "-v", f"--gpu-name={target}", str(file), "-o", str(Path(folder) / "kernel.cubin")]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", said)[1])
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", said)))
    return Compiled(sm, dtype, k, rows, registers, spilled, done.metadata.shared, done.asm["ttir"])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    return cli.Parser(description="Compile the Triton kernel for GPUs that are not here and show what it needs.")


def run(argv: list[str] | None = None) -> int:
    """Print the table; 1 if anything spills or does not fit."""
    parser().parse_args(argv)
    print(f"{'target':<6} {'dtype':<8} {'k':>3} {'rows':>6} {'registers':>9} {'spilled':>7} {'shared':>7}  limit")
    bad = False
    for sm in SHARED_LIMIT:
        for dtype in DTYPES:
            for k in (10, 64):
                for rows in (1, 16384):
                    c = compile_project(sm, dtype, k, rows)
                    bad |= bool(c.faults())
                    print(
                        f"sm_{sm:<3} {dtype:<8} {k:>3} {rows:>6} {c.registers:>9} {c.spilled:>7} {c.shared:>7}  "
                        f"{SHARED_LIMIT[sm]} {' '.join(c.faults())}"
                    )
    return 1 if bad else 0


if __name__ == "__main__":
    cli.main(run)
