"""Launch every kernel once, for a sanitizer or a profiler: python -m bench.smoke [--case awkward|qwen]

    awkward    for compute-sanitizer: every form, operation and dtype, on small sizes that fill no block
    qwen       for ncu: every form in bfloat16 at Qwen2.5-3B's width, with few rows and with many

It neither checks nor times anything. Inputs are made on the CPU and copied, so no other kernel runs.
"""

from collections.abc import Iterator

from bench.parsing import bench_parser
from kernel_surgery.common.command import Parser, main
from kernel_surgery.common.errors import UserError
from kernel_surgery.models.load import parse_device

OPERATIONS = ("project", "project_add", "project_add_rmsnorm")
# (form, rows, d, k). The basis is packed where the form needs it.
AWKWARD = [
    *(("row", 3, 129, 10), ("row", 1, 2049, 33), ("row", 17, 64, 1), ("row", 5, 2048, 16), ("row", 2, 4096, 16)),
    *(("two-pass", 67, 129, 10), ("two-pass", 70, 300, 33), ("two-pass", 65, 64, 64)),
    *(("tile", 67, 128, 16), ("tile", 17, 896, 16), ("tile", 33, 2048, 16)),
]
QWEN = [
    *(("row", m, 2048, 16) for m in (1, 64)),
    *((form, m, 2048, 16) for m in (256, 4096, 16384) for form in ("tile", "two-pass")),
]


def launches(case: str) -> Iterator[tuple[str, str, str, int, int, int]]:
    """(operation, dtype, form, rows, d, k) of every launch."""
    shapes, dtypes = (AWKWARD, ("bfloat16", "float16", "float32")) if case == "awkward" else (QWEN, ("bfloat16",))
    for operation in OPERATIONS:
        for dtype in dtypes:
            for shape in shapes:
                # `form_of` chooses the tile form for bfloat16 only.
                if shape[0] != "tile" or dtype == "bfloat16":
                    yield operation, dtype, *shape


def launch(operation: str, dtype: str, form: str, rows: int, d: int, k: int, device) -> None:
    """One launch of an orthogonal edit, and one with a dual and an offset. Raises what Triton raises."""
    import torch

    from kernel_surgery.kernels.project import project

    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    x, residual = (torch.randn(rows, d, generator=generator).to(kind).to(device) for _ in range(2))
    basis, offset = torch.linalg.qr(torch.randn(d, k, generator=generator))[0].contiguous(), torch.randn(k)
    strengths = torch.rand(rows, generator=generator).to(device)
    more = {} if operation == "project" else {"residual": residual}
    if operation == "project_add_rmsnorm":
        more |= {"weight": torch.rand(d, generator=generator).to(kind).to(device), "eps": 1e-6}
    project(x, basis.to(device), 1.0, strengths, form=form, **more)
    more |= {"dual": basis.clone().to(device), "offset": offset.to(device)}
    project(x, basis.to(device), 1.0, strengths, form=form, **more)


def parser() -> Parser:
    """The command line."""
    p = bench_parser("smoke", "Launch every kernel once, for a sanitizer or a profiler.")
    p.add_argument("--case", choices=("awkward", "qwen"), default="awkward")
    p.add_argument("--device", default="cuda")
    return p


def run(argv: list[str] | None = None) -> int:
    """Launch the kernels one after another. Prints the name of each before its launch."""
    args = parser().parse_args(argv)
    device = parse_device(args.device)
    if device.type != "cuda":
        raise UserError(f"--device {args.device}: the kernels run on CUDA only. Nothing was launched.")
    import torch

    for one in launches(args.case):
        print(*one, flush=True)
        launch(*one, device)
        torch.cuda.synchronize(device)
    return 0


if __name__ == "__main__":
    main(run)
