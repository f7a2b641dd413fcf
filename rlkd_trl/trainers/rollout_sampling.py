"""Sampling the completions of a rollout, and reading them again, in parts that fit into memory."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rlkd_trl.models.answers import joined
from rlkd_trl.models.generation import Completions, MixedWith
from rlkd_trl.students import Policy, PolicyOutput, log_probs_in_batches
from rlkd_trl.trainers.config import RolloutConfig
from rlkd_trl.trainers.rollout import Rollout


def random_generator(seed: int, rollout_number: int, *, stream: int = 0) -> torch.Generator:
    """A CPU generator of one rollout's random numbers, the same on every process; each use has its own `stream`."""
    # Torch's CPU generator reads the lowest 32 bits of a seed only; the factor spreads streams over them.
    return torch.Generator().manual_seed(seed * 1_000_003 + rollout_number + stream * 2_654_435_761)


def uniform_rows(
    batch_size: int, width: int, generator: torch.Generator, *, process_index: int, num_processes: int
) -> Tensor:
    """This process's rows, `[batch_size, width]`, of uniform random numbers drawn for the global batch.

    So any number of processes, and any cut into micro-batches, samples the same completions.
    """
    uniforms = torch.rand((batch_size * num_processes, width), generator=generator)
    first = batch_size * process_index
    return uniforms[first : first + batch_size]


def sample_in_parts(
    policy: Policy,
    prompt_ids_PS: Tensor,
    prompt_mask_PS: Tensor,
    prompt_index_B: Tensor,
    uniforms_BT: Tensor,
    args: RolloutConfig,
    mixed_with: Callable[[slice], MixedWith] | None = None,
) -> Completions:
    """`num_generations` completions of each prompt, those of a prompt next to each other.

    `mixed_with` gives the teacher to mix with for a slice of the prompts.
    """
    P, K = len(prompt_ids_PS), args.num_generations
    # Whole prompts at a time, so that memory does not grow with the rollout.
    count = max(1, args.sampling_batch_size // K)
    parts = [
        policy.sample(
            prompt_ids_PS[first : first + count],
            prompt_mask_PS[first : first + count],
            prompt_index_B[: min(count, P - first) * K],
            max_completion_length=args.max_completion_length,
            uniforms_BT=uniforms_BT[first * K : (first + count) * K],
            top_k=args.top_k,
            mixed_with=None if mixed_with is None else mixed_with(slice(first, first + count)),
        )
        for first in range(0, P, count)
    ]
    return joined(parts, pad_id=policy.pad_id)


def outputs_in_parts(policy: Policy, rollout: Rollout, *, batch_size: int) -> list[PolicyOutput]:
    """The training forward pass over the rollout, without gradients or entropies, `batch_size` completions at a time.

    Not in the update's micro-batches but in larger parts, which is faster; the last digit may differ for it.
    """
    return [policy(**part.policy_inputs(), with_entropy=False) for part in _parts(rollout, batch_size)]


def log_probs_in_parts(policy: Policy, rollout: Rollout, *, batch_size: int) -> Tensor:
    """log π(y_t|s_t) of the whole rollout, `[B, T]`."""
    inputs = (part.policy_inputs() for part in _parts(rollout, batch_size))
    return log_probs_in_batches(policy, inputs, rollout.completion_ids_BT.shape[1])


def _parts(rollout: Rollout, batch_size: int) -> Iterator[Rollout]:
    for number in range(math.ceil(len(rollout.completion_ids_BT) / batch_size)):
        yield rollout.micro_batch(number, batch_size)
