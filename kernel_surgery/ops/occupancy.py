"""How many blocks of a kernel a multiprocessor holds at once, and how many bytes must be in flight to keep memory busy.

The rules are those of `cuda_occupancy.h` in the CUDA toolkit, for compute capabilities 8.0 and 9.0: registers are given
to each warp in units of 256, and a warp takes them from one of four equal parts of the multiprocessor's registers;
shared memory is given in units of 128 bytes, after one kilobyte that the system takes for each block. It is assumed
that the driver gives as much of the L1 cache to shared memory as the blocks can use.

With one block, nothing is loaded while the block stores. With two, one can load while the other stores.
"""

WARP = 32  # threads
REGISTERS, REGISTER_UNIT, PARTS = 65536, 256, 4
THREADS, BLOCKS = 2048, 32
# Shared memory in bytes: of a multiprocessor, and what one block may use of it.
SHARED = {80: 164 * 1024, 90: 228 * 1024}
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
SHARED_UNIT, SHARED_RESERVED = 128, 1024

# By Little's law, memory is busy if bandwidth x latency bytes are in flight. This is an estimate, not a measurement.
# Bandwidth: NVIDIA's datasheet of the H200. Latency: arXiv:2402.13499 reports a little under 500 cycles for an idle
# H100, about 0.3 us; 0.7 us is a guess for a busy one, where requests queue.
ESTIMATE_OF = "NVIDIA H200"
ESTIMATE = {"bandwidth": 4.8e12, "multiprocessors": 132, "latency": 700e-9}


def blocks_by(sm: int, registers: int, shared: int, warps: int) -> dict[str, int]:
    """Return how many blocks each resource allows at once on compute capability `sm` (80 or 90).

    registers: per thread. shared: bytes per block. warps: per block. The keys are "registers", "shared memory",
    "threads" and "blocks", in the order in which `limit` looks at them. 0: such a block cannot be launched.
    """
    of_warp = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    resident = REGISTERS // PARTS // of_warp * PARTS  # warps
    taken = -(-(shared + SHARED_RESERVED) // SHARED_UNIT) * SHARED_UNIT
    return {
        "registers": resident // warps,
        "shared memory": SHARED[sm] // taken if shared <= SHARED_LIMIT[sm] else 0,
        "threads": THREADS // (WARP * warps),
        "blocks": BLOCKS,
    }


def limit(allowed: dict[str, int]) -> str:
    """Return which resource of `blocks_by` allows the fewest blocks: the first, if several do."""
    return min(allowed, key=lambda name: allowed[name])


def bytes_needed() -> int:
    """Return the bytes that a multiprocessor must have in flight to keep the memory of an H200 busy, by ESTIMATE."""
    return round(ESTIMATE["bandwidth"] / ESTIMATE["multiprocessors"] * ESTIMATE["latency"])
