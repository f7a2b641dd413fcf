"""Sampling the completions of a rollout, and reading them again, in parts that fit into memory."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlkd_trl.models.answers import joined
from rlkd_trl.models.backbone import Backbone
from rlkd_trl.models.generation import Completions, MixedWith
from rlkd_trl.models.prompts import tokenize_prompts
from rlkd_trl.students import Policy, PolicyOutput, log_probs_in_batches
from rlkd_trl.trainers.config import RolloutConfig
from rlkd_trl.trainers.rollout import Rollout


@dataclass(frozen=True)
class RolloutSampling:
    """Prompts in, completions and their log-probabilities out, for this process's share of a rollout.

    Random numbers depend on the seed and the rollout's number only: a resumed run needs no generator's state, and any
    number of processes, and any cut into micro-batches, samples the same completions.
    """

    args: RolloutConfig
    processing_class: PreTrainedTokenizerBase
    accelerator: Accelerator

    def tokenized(
        self,
        backbone: Backbone,
        texts: list[str],
        max_length: int | None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Ids and mask `[P, S]` for a model, by the student's tokenizer unless another is given."""
        ids_PS, mask_PS = tokenize_prompts(
            tokenizer or self.processing_class, texts, padding_side=backbone.padding_side, max_length=max_length
        )
        return ids_PS.to(self.accelerator.device), mask_PS.to(self.accelerator.device)

    def student_prompts(self, policy: Policy, rows: list[dict]) -> tuple[Tensor, Tensor]:
        """Ids and mask `[P, S]` of the rows' prompts, as the student reads them."""
        return self.tokenized(
            policy.backbone, policy.writer.texts(row["prompt"] for row in rows), self.args.max_prompt_length
        )

    def prompt_index(self, num_prompts: int) -> Tensor:
        """The prompt of each completion, `[B]`: those of a prompt are next to each other."""
        prompts = torch.arange(num_prompts, device=self.accelerator.device)
        return prompts.repeat_interleave(self.args.num_generations)

    def generator(self, rollout_number: int, *, stream: int = 0) -> torch.Generator:
        """A CPU generator of a rollout's random numbers, the same on every process; each use has its own `stream`."""
        # Torch's CPU generator reads the lowest 32 bits of a seed only; the factor spreads streams over them.
        return torch.Generator().manual_seed(self.args.seed * 1_000_003 + rollout_number + stream * 2_654_435_761)

    def uniforms(self, batch_size: int, rollout_number: int) -> Tensor:
        """This process's rows, `[batch_size, T]`, of uniform random numbers drawn for the global batch."""
        size = (batch_size * self.accelerator.num_processes, self.args.max_completion_length)
        uniforms = torch.rand(size, generator=self.generator(rollout_number))
        first = batch_size * self.accelerator.process_index
        return uniforms[first : first + batch_size].to(self.accelerator.device)

    def completions(
        self,
        policy: Policy,
        prompt_ids_PS: Tensor,
        prompt_mask_PS: Tensor,
        rollout_number: int,
        mixed_with: Callable[[slice], MixedWith] | None = None,
    ) -> Completions:
        """`num_generations` completions of each prompt, sampled from the policy.

        `mixed_with` gives the teacher to mix with for a slice of the prompts. The policy's log-probabilities, and the
        values of a critic that shares its weights, come with them where sampling tells them.
        """
        tells = mixed_with is None and policy.samples_as_it_reads()
        P, K = len(prompt_ids_PS), self.args.num_generations
        prompt_index_B = self.prompt_index(P)
        uniforms_BT = self.uniforms(len(prompt_index_B), rollout_number)
        # Whole prompts at a time, so that memory does not grow with the rollout.
        count = max(1, self.args.sampling_batch_size // K)
        parts = [
            policy.sample(
                prompt_ids_PS[first : first + count],
                prompt_mask_PS[first : first + count],
                prompt_index_B[: min(count, P - first) * K],
                max_completion_length=self.args.max_completion_length,
                uniforms_BT=uniforms_BT[first * K : (first + count) * K],
                top_k=self.args.top_k,
                mixed_with=None if mixed_with is None else mixed_with(slice(first, first + count)),
                with_values=tells and policy.value_head is not None,
            )
            for first in range(0, P, count)
        ]
        completions = joined(parts, pad_id=policy.pad_id)
        return completions if tells else replace(completions, logps_BT=None)

    def rollout_of(self, prompt_PS: tuple[Tensor, Tensor], completions: Completions) -> Rollout:
        """The rollout of tokenized prompts and their completions, before anything has scored them."""
        prompt_index_B = self.prompt_index(len(prompt_PS[0]))
        return Rollout.of(*prompt_PS, prompt_index_B, completions, mask_truncated=self.args.mask_truncated_completions)

    def outputs(self, policy: Policy, rollout: Rollout) -> list[PolicyOutput]:
        """The training forward pass over the rollout, without gradients or entropies, some completions at a time.

        Not in the update's micro-batches but in larger parts, which is faster; the last digit may differ for it.
        """
        return [policy(**part.policy_inputs(), with_entropy=False) for part in self._parts(rollout)]

    def log_probs(self, policy: Policy, rollout: Rollout) -> Tensor:
        """log π(y_t|s_t) of the whole rollout, `[B, T]`."""
        inputs = (part.policy_inputs() for part in self._parts(rollout))
        return log_probs_in_batches(policy, inputs, rollout.completion_ids_BT.shape[1])

    def _parts(self, rollout: Rollout) -> Iterator[Rollout]:
        size = self.args.local_rollout_forward_batch_size
        for number in range(math.ceil(len(rollout.completion_ids_BT) / size)):
            yield rollout.micro_batch(number, size)
