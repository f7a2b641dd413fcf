import dataclasses

import torch

from rlkd_trl.models.generation import Completions
from rlkd_trl.trainers.rollout import Rollout

LENGTHS = [2, 4, 1, 3, 5, 5, 1, 1]
ENDED = [True, True, True, False, False, True, True, False]


def ragged_rollout(num_generations: int = 2, mask_truncated: bool = False) -> Rollout:
    """Eight completions; every entry of every tensor tells its row and column: 100 · row + column."""
    P, T = 8 // num_generations, 5
    codes = torch.arange(8)[:, None] * 100 + torch.arange(T + 1)[None, :]
    mask = torch.tensor([[t < length for t in range(T)] for length in LENGTHS])
    rollout = Rollout.of(
        torch.arange(P)[:, None] * 100 + torch.arange(3)[None, :],
        torch.arange(P)[:, None] * 100 + torch.arange(3)[None, :] + 50,
        torch.arange(P).repeat_interleave(num_generations),
        Completions(codes[:, :T], mask, torch.tensor(ENDED)),
        mask_truncated=mask_truncated,
    )
    return rollout.with_(
        old_logps_BT=codes[:, :T] + 0.1,
        old_values_BT1=codes + 0.2,
        rewards_BT=codes[:, :T] + 0.3,
        potentials_BT1=codes + 0.4,
        advantages_BT=codes[:, :T] + 0.5,
        returns_BT=codes[:, :T] + 0.6,
    )


def test_micro_batches_hold_every_row_once_and_lose_no_token():
    for num_generations in (1, 2, 4, 8):
        rollout = ragged_rollout(num_generations)
        for size in (1, 2, 4, 8):
            for index in range(8 // size):
                batch = rollout.micro_batch(index, size)
                for b in range(size):
                    row, n = index * size + b, LENGTHS[index * size + b]
                    codes = [100 * row + t for t in range(n)]
                    assert batch.completion_ids_BT[b][batch.completion_mask_BT[b]].tolist() == codes
                    assert batch.ended_B[b] == ENDED[row]
                    for name, offset in (("old_logps_BT", 0.1), ("rewards_BT", 0.3), ("advantages_BT", 0.5)):
                        torch.testing.assert_close(getattr(batch, name)[b, :n], torch.tensor(codes) + offset)
                    torch.testing.assert_close(batch.returns_BT[b, :n], torch.tensor(codes) + 0.6)
                    # The state after the last token is kept too: n + 1 values.
                    codes.append(100 * row + n)
                    torch.testing.assert_close(batch.old_values_BT1[b, : n + 1], torch.tensor(codes) + 0.2)
                    torch.testing.assert_close(batch.potentials_BT1[b, : n + 1], torch.tensor(codes) + 0.4)
                    prompt = row // num_generations
                    assert batch.prompt_ids_PS[batch.prompt_index_B[b]].tolist() == [
                        100 * prompt + s for s in range(3)
                    ]
                    assert batch.prompt_mask_PS[batch.prompt_index_B[b], 0] == 100 * prompt + 50


def test_micro_batches_are_cut_to_their_longest_completion_and_their_own_prompts():
    batch = ragged_rollout().micro_batch(1, 2)  # rows 2 and 3, of lengths 1 and 3, both of prompt 1
    assert batch.completion_ids_BT.shape == (2, 3)
    assert batch.old_values_BT1.shape == (2, 4)
    assert batch.prompt_ids_PS.tolist() == [[100, 101, 102]]
    assert batch.prompt_index_B.tolist() == [0, 0]
    assert ragged_rollout(num_generations=4).micro_batch(0, 2).prompt_index_B.tolist() == [0, 0]
    # Three per prompt, cut by two: the second micro-batch spans prompts 0 and 1.
    rollout = dataclasses.replace(ragged_rollout(), prompt_index_B=torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]))
    assert rollout.micro_batch(1, 2).prompt_index_B.tolist() == [0, 1]
    assert rollout.micro_batch(2, 2).prompt_index_B.tolist() == [0, 0]
    assert rollout.micro_batch(2, 2).prompt_ids_PS[:, 0].tolist() == [100]


def test_missing_tensors_stay_missing():
    rollout = ragged_rollout().with_(old_values_BT1=None, returns_BT=None)
    batch = rollout.micro_batch(0, 4)
    assert batch.old_values_BT1 is None and batch.returns_BT is None


def test_truncated_completions_can_be_left_out_of_the_loss():
    kept = ragged_rollout(mask_truncated=True).loss_mask_BT.sum(dim=1).tolist()
    assert kept == [n if ended else 0 for n, ended in zip(LENGTHS, ENDED, strict=True)]
    assert ragged_rollout(mask_truncated=False).loss_mask_BT.sum(dim=1).tolist() == LENGTHS


def test_last_token_of_truncated_completions():
    found = ragged_rollout().truncated_last_token_BT().nonzero().tolist()
    assert found == [[3, 2], [4, 4], [7, 0]]
