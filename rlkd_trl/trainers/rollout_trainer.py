"""Training on rollouts: make one, pass over it in micro-batches, make the next."""

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from rlkd_trl.models.answers import joined
from rlkd_trl.models.backbone import Backbone
from rlkd_trl.models.generation import Completions, MixedWith
from rlkd_trl.models.prompts import tokenize_prompts
from rlkd_trl.ops.masking import pad_columns
from rlkd_trl.rewards import RewardModel
from rlkd_trl.students import Policy, PolicyOutput
from rlkd_trl.trainers.checks import check_prompts
from rlkd_trl.trainers.config import RolloutConfig
from rlkd_trl.trainers.policy_trainer import PolicyTrainer
from rlkd_trl.trainers.prompt_sampler import EpochSeededSampler
from rlkd_trl.trainers.rollout import Rollout
from rlkd_trl.trainers.rollout_metrics import PhaseTimer

_STATE_FILE = "rollout_state.json"


@dataclass
class RolloutState:
    """What the next update depends on, beyond weights and optimizer, and what the run has spent.

    micro_step: micro-batches seen; it gives the place in the current rollout, and the random numbers of the next.
    beta: the (adaptive) KL coefficient. return_mean, return_variance: moments that a critic's targets are normalised
    with. stopped: the rest of this rollout's updates are skipped.
    """

    micro_step: int = 0
    beta: float = 0.0
    return_mean: float = 0.0
    return_variance: float | None = None
    generated_tokens: int = 0
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    stopped: bool = False
    rollout: Rollout | None = None
    window_tokens: list[Tensor] | None = None
    window_sequences: list[Tensor] | None = None


_SAVED = ("micro_step", "beta", "return_mean", "return_variance", "generated_tokens", "cpu_seconds", "wall_seconds")


@dataclass(frozen=True)
class Cost:
    """What training has taken so far, over all processes; evaluations before and after it are not in it.

    generated_tokens: completion tokens of all rollouts, sampled from a model or, in distillation on data, read from
    the data. cpu_seconds: of the processes, all threads. wall_seconds: of the first process.
    """

    optimizer_steps: int
    generated_tokens: int
    cpu_seconds: float
    wall_seconds: float


class RolloutTrainer(PolicyTrainer):
    """Base of every trainer that learns from completions: where they come from and what is learnt is the method's."""

    def __init__(
        self,
        model: PreTrainedModel | str,
        reward_model: RewardModel,
        args: RolloutConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs,
    ):
        check_prompts(train_dataset, args)
        self.rollout_state = RolloutState()
        self._window_metrics: dict[str, float] = defaultdict(float)
        self._timer = PhaseTimer()
        super().__init__(model, reward_model, args, train_dataset, eval_dataset, processing_class, **kwargs)
        self.add_callback(_Meter(self))

    @property
    def _micro_steps_per_rollout(self) -> int:
        return self.args.steps_per_generation * self.args.num_iterations

    @property
    def _rollout_number(self) -> int:
        return self.rollout_state.micro_step // self._micro_steps_per_rollout

    # What each method defines

    def make_rollout(self, rows: list[dict]) -> Rollout:
        """Completions for this device's prompts, with all that the updates read."""
        raise NotImplementedError

    def micro_batch_loss(
        self, model, batch: Rollout, *, tokens: Tensor, sequences: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch, divided by the optimizer step's count of tokens or sequences."""
        raise NotImplementedError

    # Sampling

    def _tokenized(
        self,
        backbone: Backbone,
        texts: list[str],
        max_length: int | None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Ids and mask `[P, S]`, by the student's tokenizer unless another is given."""
        ids_PS, mask_PS = tokenize_prompts(
            tokenizer or self.processing_class, texts, padding_side=backbone.padding_side, max_length=max_length
        )
        return ids_PS.to(self.accelerator.device), mask_PS.to(self.accelerator.device)

    def _sample(
        self,
        policy: Policy,
        prompt_ids_PS: Tensor,
        prompt_mask_PS: Tensor,
        mixed_with: Callable[[slice], MixedWith] | None = None,
    ) -> Completions:
        """`num_generations` completions of each prompt, those of a prompt next to each other.

        `mixed_with` gives the teacher to mix with for a slice of the prompts.
        """
        args, P = self.args, len(prompt_ids_PS)
        prompt_index_B = self._prompt_index(P)
        uniforms_BT = self._uniforms(len(prompt_index_B))
        # Whole prompts at a time, so that memory does not grow with the rollout.
        count = max(1, args.sampling_batch_size // args.num_generations)
        parts = [
            policy.sample(
                prompt_ids_PS[first : first + count],
                prompt_mask_PS[first : first + count],
                prompt_index_B[: min(count, P - first) * args.num_generations],
                max_completion_length=args.max_completion_length,
                uniforms_BT=uniforms_BT[first * args.num_generations : (first + count) * args.num_generations],
                top_k=args.top_k,
                mixed_with=None if mixed_with is None else mixed_with(slice(first, first + count)),
            )
            for first in range(0, P, count)
        ]
        return joined(parts, pad_id=policy.pad_id)

    def _prompt_index(self, num_prompts: int) -> Tensor:
        prompts = torch.arange(num_prompts, device=self.accelerator.device)
        return prompts.repeat_interleave(self.args.num_generations)

    def _uniforms(self, batch_size: int) -> Tensor:
        """This device's rows of the rollout's random numbers, which depend on the seed and the rollout's number only.

        Drawn for the global batch, so that any number of devices, and any cut into micro-batches, samples the same
        completions; without any generator state, so that a resumed run does too.
        """
        shape = (batch_size * self.accelerator.num_processes, self.args.max_completion_length)
        first = batch_size * self.accelerator.process_index
        uniforms = torch.rand(shape, generator=self._rollout_generator())
        return uniforms[first : first + batch_size].to(self.accelerator.device)

    def _rollout_generator(self, stream: int = 0) -> torch.Generator:
        """Another `stream` for another use of random numbers."""
        # Torch's CPU generator reads the lowest 32 bits of a seed only; the factor spreads streams over them.
        seed = self.args.seed * 1_000_003 + self._rollout_number + stream * 2_654_435_761
        return torch.Generator().manual_seed(seed)

    def _rollout_of(self, prompt_PS: tuple[Tensor, Tensor], completions: Completions) -> Rollout:
        prompt_index_B = self._prompt_index(len(prompt_PS[0]))
        return Rollout.of(*prompt_PS, prompt_index_B, completions, mask_truncated=self.args.mask_truncated_completions)

    def _outputs(self, policy: Policy, rollout: Rollout) -> list[PolicyOutput]:
        """The training forward pass over the rollout, without gradients or entropies.

        Not in the update's micro-batches but in larger parts, which is faster; the last digit may differ for it.
        """
        size = self.args.local_rollout_forward_batch_size
        count = math.ceil(len(rollout.completion_ids_BT) / size)
        return [policy(**rollout.micro_batch(i, size).policy_inputs(), with_entropy=False) for i in range(count)]

    def _log_probs(self, policy: Policy, rollout: Rollout) -> Tensor:
        """log π(y_t|s_t) of the whole rollout, `[B, T]`."""
        width = rollout.completion_ids_BT.shape[1]
        return pad_columns([output.logps_BT for output in self._outputs(policy, rollout)], width)

    # Updates

    def compute_loss(self, model, inputs: Rollout, return_outputs=False, num_items_in_batch=None):
        """The micro-batch's share of the global batch's loss: the gradient of one big batch, however it was cut."""
        state, args = self.rollout_state, self.args
        window = (state.micro_step % args.steps_per_generation) // args.gradient_accumulation_steps
        # Gradients are averaged over processes, and Trainer divides by the accumulation steps: undo both.
        world, accumulation = self.accelerator.num_processes, self.current_gradient_accumulation_steps
        tokens, sequences = state.window_tokens[window] / world, state.window_sequences[window] / world
        loss, metrics = self.micro_batch_loss(model, inputs, tokens=tokens, sequences=sequences)
        for name, share in self._mean_over_ranks(metrics).items():
            self._window_metrics[name] += share
        return loss * accumulation

    def training_step(self, model, inputs: list[dict], num_items_in_batch=None) -> Tensor:
        state, args = self.rollout_state, self.args
        if state.rollout is None or state.micro_step % self._micro_steps_per_rollout == 0:
            state.rollout = self.make_rollout(inputs)
            state.stopped = False
            self._count_windows(state.rollout)
        if state.stopped:
            # Without gradients the optimizer leaves the weights alone; every process agrees on this.
            loss = torch.zeros((), device=args.device)
        else:
            batch = state.rollout.micro_batch(
                state.micro_step % args.steps_per_generation, args.per_device_train_batch_size
            )
            with self._timer.phase("update"):
                loss = super().training_step(model, batch, num_items_in_batch)
        state.micro_step += 1
        if state.micro_step % args.gradient_accumulation_steps == 0 and self._window_metrics:
            self._close_window()
        if state.micro_step % self._micro_steps_per_rollout == 0:
            self._record(self._timer.reset(tokens=int(state.rollout.completion_mask_BT.sum())))
        return loss

    def _close_window(self) -> None:
        """Records an optimizer step's metrics."""
        self._record(self._window_metrics)
        self._window_metrics.clear()

    def _prepare_inputs(self, inputs):
        return inputs  # a rollout is made on its device

    def _count_windows(self, rollout: Rollout) -> None:
        """Tokens and sequences in the loss of each optimizer step, and all tokens, over all processes."""
        loss_mask_BT, mask_BT = rollout.loss_mask_BT, rollout.completion_mask_BT
        counts_B3 = torch.stack([loss_mask_BT.sum(dim=1), loss_mask_BT.any(dim=1), mask_BT.sum(dim=1)], dim=1).float()
        windows = self.args.steps_per_generation // self.args.gradient_accumulation_steps
        counts_W3 = self._sum_over_ranks(counts_B3.view(windows, -1, 3).sum(dim=1))
        self.rollout_state.generated_tokens += int(counts_W3[:, 2].sum())
        in_loss_W2 = counts_W3[:, :2].clamp(min=1)
        self.rollout_state.window_tokens = list(in_loss_W2[:, 0])
        self.rollout_state.window_sequences = list(in_loss_W2[:, 1])

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """Each rollout's prompts, once per micro-batch made from it, whole groups on each device."""
        args = self.args
        prompts = args.prompts_per_rollout
        sampler = EpochSeededSampler(
            self.train_dataset,
            mini_repeat_count=1,
            batch_size=prompts * self.accelerator.num_processes,
            repeat_count=self._micro_steps_per_rollout,
            seed=args.data_seed if args.data_seed is not None else args.seed,
        )
        loader = DataLoader(self.train_dataset, batch_size=prompts, sampler=sampler, collate_fn=list, drop_last=True)
        return self.accelerator.prepare(loader)

    # Budget and checkpoints

    def cost(self) -> Cost:
        """What the run has taken up to its last optimizer step, earlier parts of a resumed run included."""
        state = self.rollout_state
        cpu = torch.tensor(state.cpu_seconds, device=self.accelerator.device)
        return Cost(
            optimizer_steps=self.state.global_step,
            generated_tokens=state.generated_tokens,
            cpu_seconds=float(self._sum_over_ranks(cpu)),
            wall_seconds=state.wall_seconds,
        )

    def budget_is_spent(self) -> bool:
        """`max_generated_tokens` or `max_cpu_seconds` are used up; every process gets the same answer."""
        args, spent = self.args, False
        if args.max_generated_tokens is not None:
            spent = self.rollout_state.generated_tokens >= args.max_generated_tokens
        if args.max_cpu_seconds is not None:
            spent |= self.cost().cpu_seconds >= args.max_cpu_seconds
        return spent

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            state = {name: getattr(self.rollout_state, name) for name in _SAVED}
            file = Path(output_dir or self.args.output_dir) / _STATE_FILE
            file.write_text(json.dumps(state), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Here, since DeepSpeed's checkpoints do not come by `_load_from_checkpoint`."""
        super()._load_optimizer_and_scheduler(checkpoint)
        state_file = None if checkpoint is None else Path(checkpoint) / _STATE_FILE
        if state_file is not None and state_file.is_file():
            self.rollout_state = RolloutState(**json.loads(state_file.read_text(encoding="utf-8")))

    def save_cost(self, path: Path) -> None:
        """Writes `cost` as JSON."""
        cost = asdict(self.cost())
        if self.is_world_process_zero():
            path.write_text(json.dumps(cost, indent=2) + "\n", encoding="utf-8")


class _Meter(TrainerCallback):
    """Adds up time between optimizer steps, and stops the run when its budget is spent."""

    def __init__(self, trainer: RolloutTrainer):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._last = time.process_time(), time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now, spent = (time.process_time(), time.perf_counter()), self._trainer.rollout_state
        spent.cpu_seconds += now[0] - self._last[0]
        spent.wall_seconds += now[1] - self._last[1]
        self._last = now
        if self._trainer.budget_is_spent():
            control.should_training_stop = True
