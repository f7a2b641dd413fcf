"""The on-policy loop under PPO, RLOO and REINFORCE, on `transformers.Trainer`.

    1 sample     K completions per prompt from the student
    2 score      the teacher reads each completion once, in teacher forcing
    3 reward     scores to one number per token; KL penalty and truncation penalty
    4 advantage  each method's own
    5 update     each method's own loss, over micro-batches and `num_iterations` passes

Steps 1 to 4 make a `Rollout`; step 5 reads it and nothing else.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl.trainer.utils import print_prompt_completions_sample

from rlkd_trl.errors import InputError
from rlkd_trl.evaluation.evaluate import evaluate_student
from rlkd_trl.models.answers import decode, joined
from rlkd_trl.models.loading import load_model, load_tokenizer, refuse_t5_in_float16
from rlkd_trl.models.prompts import tokenize_prompts
from rlkd_trl.models.vocabulary import check_same_tokenizer
from rlkd_trl.ops.losses import approximate_kl, entropy_bonus
from rlkd_trl.ops.masking import masked_whiten, pad_columns
from rlkd_trl.ops.rewards import adaptive_kl_coefficient, kl_penalty
from rlkd_trl.rewards import RewardInputs, RewardModel
from rlkd_trl.students import Policy, PolicyOutput, frozen_copy
from rlkd_trl.trainers.checks import check_held_out, check_prompts, checked_reward_model
from rlkd_trl.trainers.config import OnPolicyConfig
from rlkd_trl.trainers.prompt_sampler import EpochSeededSampler
from rlkd_trl.trainers.rollout import Rollout
from rlkd_trl.trainers.rollout_metrics import PhaseTimer, rollout_metrics, sample_table

_STATE_FILE = "on_policy_state.json"


@dataclass
class OnPolicyState:
    """What the next update depends on, beyond weights and optimizer.

    micro_step: micro-batches seen; it gives the place in the current rollout, and the random numbers of the next.
    beta: the (adaptive) KL coefficient. return_mean, return_variance: moments that a critic's targets are normalised
    with. stopped: the rest of this rollout's updates are skipped.
    """

    micro_step: int = 0
    beta: float = 0.0
    return_mean: float = 0.0
    return_variance: float | None = None
    stopped: bool = False
    rollout: Rollout | None = None
    window_tokens: list[Tensor] | None = None
    window_sequences: list[Tensor] | None = None


class OnPolicyTrainer(Trainer):
    """Base of `PPOKDTrainer`, `RLOOKDTrainer` and `ReinforceKDTrainer`; see the module's five steps.

    Args:
        model: The student, loaded, or its directory or Hub id.
        reward_funcs: One reward or several: `TeacherForcingReward(...)`, another `TeacherReward`, a TRL reward
            function, or a function of `RewardInputs`; or a `RewardModel`. Weights are `args.reward_weights`.
        args: The method's config.
        train_dataset: Rows with a column `prompt`: what the student reads. Other columns reach the templates and
            reward functions.
        eval_dataset: The same, with `references` (lists of strings) for text metrics where the data has them.
        processing_class: The student's tokenizer; loaded with the model when that is a name.

    Raises:
        InputError: Tokenizers differ, no `prompt` column, fewer prompts than one rollout needs, T5 with fp16, settings
            that contradict the reward's.
    """

    critic_kind = "none"

    def __init__(
        self,
        model: PreTrainedModel | str,
        reward_funcs: RewardModel | Callable | Sequence[Callable],
        args: OnPolicyConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs,
    ):
        check_prompts(train_dataset, args)
        check_held_out(eval_dataset)
        if isinstance(model, str):
            processing_class = processing_class or load_tokenizer(model)
            model = load_model(model)
        if processing_class is None:
            raise InputError("A loaded student needs its tokenizer: pass `processing_class`.")
        if args.fp16:
            refuse_t5_in_float16(model.config, torch.float16)
        self.reward_model = checked_reward_model(reward_funcs, args)
        for panel in self.reward_model.panels:
            for scorer in panel.scorers:
                check_same_tokenizer(processing_class, scorer.teacher.processing_class)
        policy = Policy(model, processing_class, temperature=args.temperature, critic=self.critic_kind)
        self.on_policy_state = OnPolicyState(beta=args.beta)
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._window_metrics: dict[str, float] = defaultdict(float)
        self._timer = PhaseTimer()
        self.sample_table: list[dict[str, object]] = []
        super().__init__(
            model=policy,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=list,
            **kwargs,
        )
        # The losses here are already divided by the global count; Trainer must not divide by its own.
        self.model_accepts_loss_kwargs = False
        self.reference = None
        if args.beta > 0:
            self.reference = frozen_copy(policy, processing_class).to(self.accelerator.device)
        for panel in self.reward_model.panels:
            for scorer in panel.scorers:
                scorer.teacher.model.to(self.accelerator.device)

    @property
    def _micro_steps_per_rollout(self) -> int:
        return self.args.steps_per_generation * self.args.num_iterations

    # What each method defines

    def sampling_policy(self) -> Policy:
        """Step 1's policy, of which the rollout keeps the log-probabilities: the student as it is now."""
        return self.accelerator.unwrap_model(self.model_wrapped)

    def advantages(self, rollout: Rollout) -> Rollout:
        """Step 4: the rollout with `advantages_BT` (and `returns_BT`, with a critic)."""
        raise NotImplementedError

    def policy_loss(
        self, batch: Rollout, output: PolicyOutput, *, tokens: Tensor, sequences: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Step 5: the loss of one micro-batch, divided by the optimizer step's count of tokens or sequences."""
        raise NotImplementedError

    # Steps 1 to 4

    @torch.no_grad()
    def make_rollout(self, rows: list[dict]) -> Rollout:
        """Samples, scores, rewards and advantages for this device's prompts."""
        args, timer = self.args, self._timer
        policy = self.sampling_policy()

        with timer.phase("sample"), self.compute_loss_context_manager():
            rollout = self._sample(policy, rows)  # 1 sample
            rollout, reference_logps_BT = self._student_log_probs(policy, rollout)
        inputs = RewardInputs(
            rows=rows,
            prompt_index_B=rollout.prompt_index_B,
            completion_ids_BT=rollout.completion_ids_BT,
            completion_mask_BT=rollout.completion_mask_BT,
            ended_B=rollout.ended_B,
            completions=decode(rollout.completions, self.processing_class),
            student_logps_BT=rollout.old_logps_BT,
        )
        with timer.phase("score"):
            scores = self.reward_model.score(inputs)  # 2 score
            result = self.reward_model.rewards(inputs, scores)  # 3 reward
        rewards_BT, kl_B = result.rewards_BT, None
        if reference_logps_BT is not None:
            kl_BT = kl_penalty(rollout.old_logps_BT, reference_logps_BT, rollout.completion_mask_BT)
            rewards_BT, kl_B = rewards_BT - self.on_policy_state.beta * kl_BT, kl_BT.sum(dim=1)
        if args.missing_eos_penalty is not None:
            rewards_BT = rewards_BT - args.missing_eos_penalty * rollout.truncated_last_token_BT()
        rollout = rollout.with_(rewards_BT=rewards_BT, potentials_BT1=result.potentials_BT1)

        rollout = self.advantages(rollout)  # 4 advantage

        metrics = rollout_metrics(rollout, result, kl_B, self._sum_over_ranks)
        self._record(metrics)
        self.sample_table = sample_table(inputs, result, args.num_completions_to_print)
        if kl_B is not None:
            self._record({"beta": self.on_policy_state.beta})
            self._adapt_beta(metrics["kl"], num_samples=len(kl_B) * self.accelerator.num_processes)
        return rollout

    def _adapt_beta(self, kl: float, *, num_samples: int) -> None:
        args, state = self.args, self.on_policy_state
        if args.kl_target is not None:
            state.beta = adaptive_kl_coefficient(
                state.beta, kl=kl, target=args.kl_target, horizon=args.kl_horizon, num_samples=num_samples
            )

    def _sample(self, policy: Policy, rows: list[dict]) -> Rollout:
        args, device = self.args, self.accelerator.device
        prompt_ids_PS, prompt_mask_PS = tokenize_prompts(
            self.processing_class,
            [row["prompt"] for row in rows],
            padding_side=policy.backbone.padding_side,
            max_length=args.max_prompt_length,
        )
        prompt_ids_PS, prompt_mask_PS = prompt_ids_PS.to(device), prompt_mask_PS.to(device)
        prompt_index_B = torch.arange(len(rows), device=device).repeat_interleave(args.num_generations)
        uniforms_BT = self._uniforms(len(prompt_index_B))
        # Whole prompts at a time, about a micro-batch, so that memory does not grow with the rollout.
        count = max(1, args.per_device_train_batch_size // args.num_generations)
        parts = [
            policy.sample(
                prompt_ids_PS[first : first + count],
                prompt_mask_PS[first : first + count],
                prompt_index_B[: len(rows[first : first + count]) * args.num_generations],
                max_completion_length=args.max_completion_length,
                uniforms_BT=uniforms_BT[first * args.num_generations : (first + count) * args.num_generations],
                top_k=args.top_k,
            )
            for first in range(0, len(rows), count)
        ]
        return Rollout.of(
            prompt_ids_PS,
            prompt_mask_PS,
            prompt_index_B,
            joined(parts, pad_id=policy.pad_id),
            mask_truncated=args.mask_truncated_completions,
        )

    def _uniforms(self, batch_size: int) -> Tensor:
        """This device's rows of the rollout's random numbers, which depend on the seed and the rollout's number only.

        Drawn for the global batch, so that any number of devices, and any cut into micro-batches, samples the same
        completions; without any generator state, so that a resumed run does too.
        """
        rollout_number = self.on_policy_state.micro_step // self._micro_steps_per_rollout
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + rollout_number)
        shape = (batch_size * self.accelerator.num_processes, self.args.max_completion_length)
        first = batch_size * self.accelerator.process_index
        return torch.rand(shape, generator=generator)[first : first + batch_size].to(self.accelerator.device)

    def _student_log_probs(self, policy: Policy, rollout: Rollout) -> tuple[Rollout, Tensor | None]:
        """Old log-probabilities and values, and the reference's, from the training forward pass."""
        size, width = self.args.per_device_train_batch_size, rollout.completion_ids_BT.shape[1]
        old, reference_logps = [], []
        for i in range(self.args.steps_per_generation):
            inputs = rollout.micro_batch(i, size).policy_inputs()
            old.append(policy(**inputs))
            if self.reference is not None:
                reference_logps.append(self.reference(**inputs).logps_BT)
        rollout = rollout.with_(old_logps_BT=pad_columns([output.logps_BT for output in old], width))
        if old[0].values_BT1 is not None:
            values_BT1 = pad_columns([output.values_BT1 for output in old], width + 1)
            rollout = rollout.with_(old_values_BT1=values_BT1)
        return rollout, pad_columns(reference_logps, width) if reference_logps else None

    # Step 5

    def compute_loss(self, model, inputs: Rollout, return_outputs=False, num_items_in_batch=None):
        """The micro-batch's share of the global batch's loss: the gradient of one big batch, however it was cut."""
        state, args = self.on_policy_state, self.args
        window = (state.micro_step % args.steps_per_generation) // args.gradient_accumulation_steps
        # Gradients are averaged over processes, and Trainer divides by the accumulation steps: undo both.
        world, accumulation = self.accelerator.num_processes, self.current_gradient_accumulation_steps
        tokens, sequences = state.window_tokens[window] / world, state.window_sequences[window] / world
        output = model(**inputs.policy_inputs())
        loss, metrics = self.policy_loss(inputs, output, tokens=tokens, sequences=sequences)
        mask_BT = inputs.loss_mask_BT
        metrics["approx_kl"] = approximate_kl(output.logps_BT, inputs.old_logps_BT, mask_BT, denominator=tokens)
        entropy_loss, entropy_metrics = entropy_bonus(output.entropy_BT, mask_BT, denominator=tokens)
        if args.entropy_coef:
            loss = loss + args.entropy_coef * entropy_loss
        for name, share in self._mean_over_ranks({**metrics, **entropy_metrics}).items():
            self._window_metrics[name] += share
        return loss * accumulation

    def training_step(self, model, inputs: list[dict], num_items_in_batch=None) -> Tensor:
        state, args = self.on_policy_state, self.args
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
        """Records an optimizer step's metrics, and stops this rollout's updates if they went too far."""
        kl, limit = self._window_metrics["approx_kl"], self.args.early_stop_kl
        self.on_policy_state.stopped = limit is not None and kl > limit
        self._record(self._window_metrics)
        self._window_metrics.clear()

    def _prepare_inputs(self, inputs):
        return inputs  # a rollout is made on its device

    def _count_windows(self, rollout: Rollout) -> None:
        """Tokens and sequences in the loss of each optimizer step, over all processes."""
        counts_B2 = torch.stack([rollout.loss_mask_BT.sum(dim=1), rollout.loss_mask_BT.any(dim=1)], dim=1).float()
        windows = self.args.steps_per_generation // self.args.gradient_accumulation_steps
        counts_W2 = self._sum_over_ranks(counts_B2.view(windows, -1, 2).sum(dim=1)).clamp(min=1)
        self.on_policy_state.window_tokens = list(counts_W2[:, 0])
        self.on_policy_state.window_sequences = list(counts_W2[:, 1])

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

    # Logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of everything recorded since the last log."""
        is_training_log = "loss" in logs
        if is_training_log:
            logs = {**logs, **{name: sum(values) / len(values) for name, values in self._metrics.items()}}
            self._metrics.clear()
        super().log(logs, start_time)
        if self.args.log_completions and is_training_log and self.is_world_process_zero():
            print_prompt_completions_sample(
                [row["prompt"] for row in self.sample_table],
                [row["completion"] for row in self.sample_table],
                {"reward": [row["reward"] for row in self.sample_table]},
                None,
                self.state.global_step,
            )

    def _record(self, metrics: dict[str, Tensor | float]) -> None:
        for name, value in metrics.items():
            self._metrics[name].append(float(value))

    def _whitened(self, advantages: Tensor, mask: Tensor) -> Tensor:
        return masked_whiten(advantages, mask, sum_over_ranks=self._sum_over_ranks)

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    def _mean_over_ranks(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        means = self.accelerator.reduce(torch.stack(list(metrics.values())), reduction="mean")
        return dict(zip(metrics, means.tolist(), strict=True))

    # Evaluation and checkpoints

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Greedy outputs on the evaluation prompts: text metrics, the teacher's NLL and the reward.

        Raises:
            InputError: There is no evaluation data, or it has no column `prompt`.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise InputError("There is nothing to evaluate on: give `eval_dataset`.")
        check_held_out(dataset)
        if isinstance(dataset, dict):
            metrics = {}
            for name, rows in dataset.items():
                metrics |= self.evaluate(rows, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        policy = self.accelerator.unwrap_model(self.model_wrapped)
        with self.compute_loss_context_manager():
            result = evaluate_student(
                policy,
                self.processing_class,
                list(dataset),
                self.reward_model,
                max_prompt_length=self.args.max_prompt_length,
                max_completion_length=self.args.max_completion_length,
                batch_size=self.args.per_device_eval_batch_size,
            )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in result.metrics.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_model_card(self, *args, **kwargs) -> None:
        """Trainer's generic card before a push to the Hub, unless a recipe has left a better one."""
        if not (Path(self.args.output_dir) / "README.md").is_file():
            super().create_model_card(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        output_dir = Path(output_dir or self.args.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        self.accelerator.unwrap_model(self.model).save_pretrained(output_dir, state_dict)
        self.processing_class.save_pretrained(output_dir)
        torch.save(self.args, output_dir / "training_args.bin")
        kept = ("micro_step", "beta", "return_mean", "return_variance")
        state = {name: getattr(self.on_policy_state, name) for name in kept}
        (output_dir / _STATE_FILE).write_text(json.dumps(state), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self.accelerator.unwrap_model(self.model if model is None else model).load_pretrained(resume_from_checkpoint)
        state_file = Path(resume_from_checkpoint) / _STATE_FILE
        if state_file.is_file():
            self.on_policy_state = OnPolicyState(**json.loads(state_file.read_text(encoding="utf-8")))

    def _load_best_model(self) -> None:
        self.accelerator.unwrap_model(self.model).load_pretrained(self.state.best_model_checkpoint)
