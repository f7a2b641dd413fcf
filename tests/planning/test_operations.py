"""Operations against those counted by hand, and the seconds that they take on a machine with round numbers."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rlkd_trl.planning.activations import counted
from rlkd_trl.planning.machines import MACHINES, Machine
from rlkd_trl.planning.operations import Operation
from tests.planning.models import t5


def recorded(work, *, gradients: bool = False) -> list[Operation]:
    operations = []
    with counted([], False, operations), torch.set_grad_enabled(gradients):
        work()
    return operations


def test_a_product_of_matrices():
    left, right = torch.ones(3, 5), torch.ones(5, 7)
    # 2 · 3 · 5 · 7 operations; 15 + 35 + 21 numbers of 4 bytes
    assert recorded(lambda: left @ right) == [Operation(210, 284, False)]
    left, right = left.bfloat16(), right.bfloat16()
    assert recorded(lambda: left @ right) == [Operation(210, 142, True)]


def test_what_is_not_moved_does_not_count():
    x, table, row = torch.ones(4, 6), torch.ones(1000, 6), torch.ones(1, 6)
    assert recorded(lambda: x.view(2, 12).transpose(0, 1)[:, 0]) == []
    assert recorded(lambda: torch.empty(9)) == []
    (sums,) = recorded(lambda: x + row.expand(4, 6))
    assert sums == Operation(0, 4 * (24 + 24 + 6), False), "a repeated row is read once"
    (embedded,) = recorded(lambda: nn.functional.embedding(torch.tensor([1, 2]), table))
    assert embedded.nbytes == 2 * 2 * 6 * 4, "two rows of the table, read and written"
    (in_place,) = recorded(lambda: x.add_(1.0))
    assert in_place.nbytes == 2 * 24 * 4
    (copied,) = recorded(lambda: x.copy_(torch.ones(4, 6).view(4, 6)))[-1:]
    (zeroed,) = recorded(lambda: x.zero_())
    assert (copied.nbytes, zeroed.nbytes) == (2 * 24 * 4, 24 * 4), "what is overwritten is not read"
    rows, index = torch.ones(2, 6), torch.tensor([1, 2])
    (put,) = recorded(lambda: table.index_put_((index,), rows))
    assert put.nbytes == 2 * (2 * 6 * 4 + 2 * 8), "two rows and their numbers, not the table"


# A T5 of two layers each, D = A = 64, F = 160 (gated), V = 1000; 3 rows of S = 10 and T = 4 tokens. A multiplication
# and an addition are two operations: a token's product with a D × A matrix takes 2DA.
#   encoder: 4 projections and 3 matrices of the feed-forward layer a token, two products of S × S a head
#   decoder: 6 projections of its own tokens, 2 of the prompt's, 3 matrices; T × T and T × S pairs; the LM head
D, A, F, V, S, T, LAYERS, ROWS = 64, 64, 160, 1000, 10, 4, 2, 3
ENCODER = LAYERS * (S * (4 * 2 * D * A + 3 * 2 * D * F) + 2 * 2 * S * S * A)
DECODER = LAYERS * (T * (6 * 2 * D * A + 3 * 2 * D * F) + S * 2 * 2 * D * A + 2 * 2 * (T * T + T * S) * A)
FORWARD = ROWS * (ENCODER + DECODER + T * 2 * D * V)


@pytest.mark.parametrize("backward", [False, True])
def test_arithmetic_of_a_t5(backward):
    model = t5(tied=False).requires_grad_(backward)
    ids_BS = torch.ones(ROWS, S, dtype=torch.long)

    def work() -> None:
        logits = model(input_ids=ids_BS, decoder_input_ids=ids_BS[:, :T]).logits
        if backward:
            logits.sum().backward()

    operations = recorded(work, gradients=backward)
    # The backward pass: a product for each factor's gradient. A fused kernel computes its scores anew; T5's
    # self-attention, whose bias needs a gradient, has none.
    expected = 3 * FORWARD + ROWS * LAYERS * 2 * A * T * S if backward else FORWARD
    assert sum(operation.flops for operation in operations) == expected


def test_each_operation_takes_what_is_longest():
    machine = Machine(
        memory_gib=0, float32=100.0, bfloat16=1000.0, bandwidth=10.0, link=1.0, bus=1.0, seconds_per_operation=0.5
    )
    assert machine.seconds([Operation(300, 10, False)]) == 3.0, "arithmetic"
    assert machine.seconds([Operation(300, 20, True)]) == 2.0, "memory"
    assert machine.seconds([Operation(300, 4, True)]) == 0.5, "launch"
    assert machine.seconds([Operation(300, 10, False), Operation(0, 1, False)]) == 3.5
    shared = [Operation(300, 10, False), Operation(0, 40, False), Operation(0, 1, False)]
    assert machine.seconds(shared, share=0.5) == 1.5 + 2.0 + 0.5, "a launch is a launch"


# From the vendors' data sheets: TFLOP/s dense in float32 and bfloat16, GB/s of memory.
RATED = {
    "a100": (19.5, 312, 2039),
    "a100_40gb": (19.5, 312, 1555),
    "h100": (67, 989, 3350),
    "h200": (67, 989, 4800),
    "l4": (30.3, 121, 300),
    "rtx4090": (82.6, 165, 1008),
    "rtx3090": (35.6, 71, 936),
}


def test_a_gpu_reaches_a_share_of_its_ratings():
    """0.6 of its arithmetic, 0.8 of its bandwidth, 0.7 of its links."""
    assert MACHINES.keys() == RATED.keys()
    for name, (float32, bfloat16, bandwidth) in RATED.items():
        found = MACHINES[name]
        assert found.float32 == pytest.approx(0.6 * float32 * 1e12)
        assert found.bfloat16 == pytest.approx(0.6 * bfloat16 * 1e12, rel=0.01)
        assert found.bandwidth == pytest.approx(0.8 * bandwidth * 1e9)
    # NVLink 4 has 450 GB/s in one direction, PCIe 5 64; a card without NVLink has PCIe 4.
    assert (MACHINES["h100"].link, MACHINES["h100"].bus) == pytest.approx((0.7 * 450e9, 0.7 * 64e9))
    assert MACHINES["a100"].link == pytest.approx(0.7 * 300e9)
    assert MACHINES["l4"].link == MACHINES["rtx4090"].bus == pytest.approx(0.7 * 32e9)


def test_attention_under_autocast_is_in_16_bits():
    """As a GPU's is, also where rotary positions have made its queries float32."""
    operations: list[Operation] = []
    with FakeTensorMode(), counted([], True, operations), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        query = torch.ones(1, 2, 8, 16)
        nn.functional.scaled_dot_product_attention(query, query, query)
    products = [operation for operation in operations if operation.flops]
    assert products and all(operation.is_16_bit for operation in products)
