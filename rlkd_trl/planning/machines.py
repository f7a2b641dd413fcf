"""What GPUs are rated at, and how long operations take on one: the roofline model, operation by operation.

Ratings are the vendors' own, of dense matrix products (no sparsity), those in bfloat16 summed in float32. The
roofline: Williams, Waterman & Patterson 2009, "Roofline: An Insightful Visual Performance Model for Multicore
Architectures".
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlkd_trl.planning.operations import Operation

GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Machine:
    """What one GPU does in a second, and what its operations cost at least.

    float32, bfloat16: floating-point operations per second in matrix products. bandwidth: bytes per second from and to
    its memory. link: bytes per second from the other GPUs of a node, in one direction. bus: the same from the node's
    CPU memory. seconds_per_operation: what Python and the launch of a kernel take.
    """

    memory_gib: float
    float32: float
    bfloat16: float
    bandwidth: float
    link: float
    bus: float
    seconds_per_operation: float

    def seconds(self, operations: "Iterable[Operation]", *, share: float = 1.0) -> float:
        """How long the operations take one after another: each the longest of arithmetic, memory and launch.

        share: of their arithmetic and bytes.
        """
        return sum(
            max(
                share * operation.flops / (self.bfloat16 if operation.is_16_bit else self.float32),
                share * operation.nbytes / self.bandwidth,
                self.seconds_per_operation,
            )
            for operation in operations
        )


# Assumed, not measured: the shares of its ratings that a GPU reaches in eager PyTorch, and the host's time to launch.
COMPUTE_SHARE, BANDWIDTH_SHARE, LINK_SHARE = 0.6, 0.8, 0.7
SECONDS_PER_OPERATION = 10e-6


def _gpu(memory_gib: float, float32: float, bfloat16: float, bandwidth: float, link: float, bus: float) -> Machine:
    """From ratings in GiB, TFLOP/s and GB/s."""
    return Machine(
        memory_gib,
        float32 * TERA * COMPUTE_SHARE,
        bfloat16 * TERA * COMPUTE_SHARE,
        bandwidth * GIGA * BANDWIDTH_SHARE,
        link * GIGA * LINK_SHARE,
        bus * GIGA * LINK_SHARE,
        SECONDS_PER_OPERATION,
    )


# Memory as programs see it; float32 and bfloat16 products; memory bandwidth; link (NVLink between A100, H100 and H200,
# PCIe between the others) and bus (PCIe), in one direction. A100, H100 and H200 are the SXM boards: those for PCIe are
# slower. GPUs of the RTX 40 series cannot reach each other's memory: what they send passes through the CPU's, which
# may take longer than the link's rating says. Float32 is the rate without TF32, which PyTorch uses only if told to.
MACHINES = {
    "a100": _gpu(79, 19.5, 312, 2039, 300, 32),  # of 80 GB
    "a100_40gb": _gpu(39, 19.5, 312, 1555, 300, 32),
    "h100": _gpu(79, 67, 989, 3350, 450, 64),
    "h200": _gpu(139, 67, 989, 4800, 450, 64),
    "l4": _gpu(22, 30.3, 121, 300, 32, 32),
    "rtx4090": _gpu(23.5, 82.6, 165.2, 1008, 32, 32),
    "rtx3090": _gpu(23.5, 35.6, 71, 936, 32, 32),
}
