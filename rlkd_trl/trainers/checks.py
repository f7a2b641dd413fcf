"""The checks of settings, data and models that a trainer makes before it starts."""

import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from accelerate.utils import str_to_bool
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled

from rlkd_trl.data.streams import RowStream, known_rows
from rlkd_trl.errors import InputError
from rlkd_trl.evaluation.directions import base_metric
from rlkd_trl.models.chat import PromptWriter
from rlkd_trl.models.limits import check_embedding_rows, check_lengths, position_limits
from rlkd_trl.prompts import checked_messages, is_conversation
from rlkd_trl.rewards import LogRatioReward, RewardModel, TeacherForcingReward
from rlkd_trl.teachers.panel import Scorer, TeacherPanel
from rlkd_trl.teachers.served import check_wanted
from rlkd_trl.trainers.config import OnPolicyConfig, RolloutConfig
from rlkd_trl.trainers.full_vocabulary_config import KDConfig


def check_endless(args: TrainingArguments) -> None:
    """Raises `InputError` for settings that do not go with a `RowStream`: epochs, and workers."""
    if args.max_steps <= 0:
        raise InputError(
            "A stream of rows has no known length, so there are no epochs to count: say with max_steps how long to "
            "train."
        )
    if args.dataloader_num_workers:
        raise InputError(
            f"dataloader_num_workers {args.dataloader_num_workers}: each worker would read the whole stream; leave it "
            "out."
        )


def check_prompts(dataset: Dataset | RowStream, args: RolloutConfig) -> None:
    """Raises `InputError` if there is no column `prompt` of prompts, or fewer rows than one rollout takes.

    Of a stream, which has no end, only the column is checked.
    """
    check_prompt_column(known_rows(dataset), "training data")
    check_references(known_rows(dataset), "training data")
    if isinstance(dataset, RowStream):
        check_endless(args)
        return
    needed = args.prompts_per_rollout * args.world_size
    if len(dataset) < needed:
        raise InputError(
            f"A rollout takes {needed} prompts (per_device_train_batch_size {args.per_device_train_batch_size} × "
            f"steps_per_generation {args.steps_per_generation} × {args.world_size} processes / num_generations "
            f"{args.num_generations}), but the data has {len(dataset)}."
        )


def check_column(dataset: Dataset, column: str, what: str) -> None:
    """Raises `InputError` if `dataset` is no `datasets.Dataset`, or lacks the column.

    what: "training data" or "evaluation data".
    """
    if not isinstance(dataset, Dataset):
        raise InputError(
            f"The {what} is of the type {type(dataset).__name__}: give a datasets.Dataset, whose rows can be drawn by "
            "number (of a list: Dataset.from_list(list(rows))), or rlkd_trl.data.streams.RowStream(rows) for training."
        )
    if column not in dataset.column_names:
        raise InputError(f"The {what} has no column `{column}`; its columns are: {', '.join(dataset.column_names)}.")


def check_texts(dataset: Dataset, column: str, what: str) -> None:
    """As `check_column`; raises `InputError` too if a value of the column is not text."""
    check_column(dataset, column, what)
    for i, value in enumerate(dataset[column]):
        if not isinstance(value, str):
            raise InputError(
                f"Row {i + 1} of the {what}: `{column}` is {reprlib.repr(value)} ({type(value).__name__}), not text: "
                "convert it, or leave the row out."
            )


def check_prompt_column(dataset: Dataset, what: str) -> None:
    """As `check_column`; raises `InputError` too if a `prompt` is neither a text nor a conversation."""
    check_column(dataset, "prompt", what)
    for i, prompt in enumerate(dataset["prompt"]):
        if is_conversation(prompt):
            try:
                checked_messages(prompt)
            except InputError as error:
                raise InputError(f"Row {i + 1} of the {what}: {error}") from error
        elif not isinstance(prompt, str):
            raise InputError(
                f"Row {i + 1} of the {what}: `prompt` is {reprlib.repr(prompt)} ({type(prompt).__name__}), not text "
                "and not a conversation (a list of messages): convert it, or leave the row out."
            )


def check_references(dataset: Dataset, what: str) -> None:
    """Raises `InputError` if a row's `references`, where there are any, are neither a text nor a list of texts."""
    for i, references in enumerate(dataset["references"] if "references" in dataset.column_names else []):
        texts = references if isinstance(references, list | tuple) else [references]
        if references is not None and not all(isinstance(text, str) for text in texts):
            raise InputError(
                f"Row {i + 1} of the {what}: `references` is {reprlib.repr(references)}, not a text, a list of texts "
                "or None: convert it, or leave the row out."
            )


def check_conversations(write: Callable[[Mapping[str, object]], object], dataset: Dataset, what: str) -> None:
    """Raises `InputError`, which names the row, if a conversation in the column `prompt` cannot be written.

    That is: there is no chat template, or it refuses the conversation (two turns of one role in a row, for instance).

    write: writes a row's prompt as the model reads it.
    """
    conversations = [i for i, prompt in enumerate(dataset["prompt"]) if is_conversation(prompt)]
    for i in conversations:
        try:
            write(dataset[i])
        except InputError as error:
            raise InputError(f"Row {i + 1} of the {what}: {error}") from error


def check_targets(dataset: Dataset | RowStream, args: KDConfig) -> None:
    """Raises `InputError` if sequences come from the data and a row has no `references` to learn from."""
    if args.sequences != "data" or args.lmbda == 1:
        return
    dataset = known_rows(dataset)
    rows = dataset["references"] if "references" in dataset.column_names else [[]]
    for i, references in enumerate(rows):
        if isinstance(references, str):
            raise InputError(f"Row {i + 1}: `references` is a text, not a list of texts: put it into a list.")
        if not references:
            raise InputError(
                f"Distillation on data needs targets, but row {i + 1} has none: name their column with "
                "--target_column (a column `references` of lists of texts), set sequences to 'teacher', or lmbda to 1."
            )


def empty_targets(targets: Sequence[str]) -> list[int]:
    """Which of the targets of supervised training are empty: a teacher may have answered nothing.

    Raises:
        InputError: All of them are, or one is no text.
    """
    for i, target in enumerate(targets):
        if not isinstance(target, str):
            raise InputError(f"Row {i + 1} of the training data: the target {target!r} is not a text.")
    empty = [i for i, target in enumerate(targets) if not target.strip()]
    if len(empty) == len(targets):
        raise InputError(f"All {len(empty)} targets are empty: there is nothing to learn. Is it the right column?")
    return empty


def check_sharding(args: RolloutConfig) -> None:
    """Raises `InputError` for a student sharded by FSDP, or by ZeRO-3 without being gathered when it is saved."""
    if str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")):
        raise InputError(
            "The student cannot be sharded by FSDP, which gathers weights for its whole forward pass only: use "
            "DeepSpeed, as in accelerate_configs/zero3.yaml."
        )
    if not is_deepspeed_zero3_enabled():
        return
    if not deepspeed_config()["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save"):
        raise InputError(
            "ZeRO-3 would save the student in pieces that only DeepSpeed reads: set `zero3_save_16bit_model: true` in "
            "Accelerate's YAML (stage3_gather_16bit_weights_on_model_save in DeepSpeed's own config)."
        )


def check_sharded_head(model: PreTrainedModel | PeftModel) -> None:
    """Raises `InputError` if ZeRO-3 is to shard a student whose LM head consists of several modules.

    Each of these modules would gather its weights whenever the head is applied, which is not equally often on all
    processes (see `Backbone.through_whole_head`).
    """
    if is_deepspeed_zero3_enabled() and any(model.get_output_embeddings().children()):
        raise InputError(
            "A student whose LM head has adapters cannot be sharded by ZeRO-3: leave the head out of the adapters' "
            "target_modules and modules_to_save, or use ZeRO stage 2."
        )


def check_held_out(dataset: Dataset | dict[str, Dataset] | None) -> None:
    """Raises `InputError` if evaluation data has no column `prompt` of prompts, or `references` that are not texts."""
    for rows in dataset.values() if isinstance(dataset, dict) else [dataset]:
        if rows is not None:
            check_prompt_column(rows, "evaluation data")
            check_references(rows, "evaluation data")


def check_evaluated(args: TrainingArguments, dataset: Dataset | dict[str, Dataset] | None) -> None:
    """Raises `InputError` if training is to be interrupted by evaluations, and there is nothing to evaluate on."""
    if dataset is None and args.eval_strategy != "no":
        raise InputError(
            f"eval_strategy = {args.eval_strategy.value} evaluates on held-out rows, of which there are none: pass "
            "eval_dataset, or leave it out."
        )


def check_best_metric(
    args: RolloutConfig, eval_dataset: Dataset | dict[str, Dataset] | None, *, has_teacher: bool
) -> None:
    """Raises `InputError` if `metric_for_best_model` will not be among the metrics of an evaluation."""
    name = args.metric_for_best_model
    if name is None or eval_dataset is None:
        return
    metric = base_metric(name)
    prefix = name.removeprefix("eval_").removesuffix(metric).removesuffix("_")
    sets = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    if prefix not in sets:
        wanted = ", ".join(f"eval_{set_name}_{metric}" if set_name else f"eval_{metric}" for set_name in sets)
        raise InputError(f"metric_for_best_model = {name!r} is not among the metrics here: choose {wanted}.")
    if metric in ("ibleu", "self_bleu", "student_nll_of_teacher_per_token"):
        raise InputError(f"metric_for_best_model = {name!r} is not measured during training; choose another.")
    if metric.startswith("teacher_nll") and not has_teacher:
        raise InputError(f"metric_for_best_model = {name!r} needs a reward with a teacher.")
    rows = sets[prefix]
    references = rows["references"] if "references" in rows.column_names else [[]]
    if metric in ("bleu", "rouge1", "rouge2", "rougeL", "length_ratio") and not all(references):
        raise InputError(
            f"metric_for_best_model = {name!r} compares with references, which not every held-out row has: name their "
            "column with --target_column (a column `references` of lists of texts), or choose another metric."
        )


def checked_reward_model(
    reward_funcs: RewardModel | Callable | Sequence[Callable], args: OnPolicyConfig
) -> RewardModel:
    """The rewards as one `RewardModel`; raises `InputError` if weights, γ or k contradict the trainer's."""
    if isinstance(reward_funcs, RewardModel):
        model = reward_funcs
        own_weights = [weight for _, weight in model.terms.values()]
        if args.reward_weights not in (None, own_weights):
            raise InputError(f"reward_weights {args.reward_weights} contradict the RewardModel's own, {own_weights}.")
    else:
        terms = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        model = RewardModel(terms, args.reward_weights)
    if not all(panel.can_score for panel in model.panels):
        raise InputError(
            "A teacher cache tells about fixed targets only, not about samples, which are what is rewarded here: "
            "train with kd.py (`KDTrainer`), or give the teacher itself."
        )
    for term in model.teacher_terms:
        is_absent = any(scorer.teacher.model is None for scorer in term.panel.scorers)
        if is_absent and isinstance(term, TeacherForcingReward):
            check_tells_rewards(term.value, term.tau if term.value == "soft" else None, args)
        if getattr(term, "gamma", args.gamma) != args.gamma:
            raise InputError(f"The teacher-forcing reward has gamma {term.gamma}, the trainer {args.gamma}.")
        check_k_step(getattr(term, "k", 1), args)
        check_log_ratio(term, args)
    return model


def check_positions(
    model: PreTrainedModel | PeftModel,
    writer: PromptWriter,
    reward_model: RewardModel,
    args: RolloutConfig,
    train_dataset: Dataset,
    eval_dataset: Dataset | dict[str, Dataset] | None,
) -> None:
    """Raises `InputError` if student or teachers have too few positions or embeddings for prompts and completions.

    So it does for a conversation that a chat template refuses.

    writer: of the student's prompts.
    """
    tokenizer = writer.processing_class
    held_out = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    parts = [(train_dataset, "training data"), *((rows, "evaluation data") for rows in held_out if rows)]
    check_embedding_rows("The student", tokenizer, model.config)
    for rows, what in parts:
        check_conversations(lambda row: writer.text(row["prompt"]), rows, what)
        check_lengths(
            "The student",
            position_limits(model),
            tokenizer,
            map(writer.text, rows["prompt"]),
            max_prompt_length=args.max_prompt_length,
            max_completion_length=args.max_completion_length,
        )
    for panel in reward_model.panels:
        for scorer in panel.scorers:
            teacher = scorer.teacher
            asked = partial(_asked, panel, scorer)
            for rows, what in parts:
                check_conversations(asked, rows, what)
                check_lengths(
                    "The teacher",
                    teacher.limits,
                    teacher.processing_class,
                    map(asked, rows),
                    max_prompt_length=teacher.max_prompt_length,
                    max_completion_length=args.max_completion_length,
                    prompt_flag="the teacher's max_prompt_length",
                )


def _asked(panel: TeacherPanel, scorer: Scorer, row: Mapping[str, object]) -> str:
    """A row's question as the scorer's teacher reads it."""
    return scorer.prompts([panel.questions(row)])[0]


def check_tells_rewards(value: str, tau: float | None, args: OnPolicyConfig) -> None:
    """Raises `InputError` for a teacher-forcing reward that a served teacher, which tells log p only, cannot give."""
    check_wanted(expected=value == "expected", tau=tau)
    # The sum over a completion, which is all that RLOO reads at the level of sequences, differs by V of the prompt.
    if not args.teacher_baseline and getattr(args, "level", None) != "sequence":
        raise InputError(
            "A served teacher tells log p, and the teacher-forcing reward is of logits: they agree where it is shaped "
            "by the teacher's V. Set teacher_baseline to True, or choose the reward log_likelihood or log_ratio."
        )


def check_log_ratio(reward: object, args: OnPolicyConfig) -> None:
    """Raises `InputError` for the reward log_ratio (class or instance) if another policy than the student samples."""
    is_log_ratio = issubclass(reward if isinstance(reward, type) else type(reward), LogRatioReward)
    if is_log_ratio and (args.top_k or getattr(args, "samples_from_a_copy", False)):
        raise InputError(
            "log_ratio goes with neither top_k nor behaviour_sync_steps: it compares the teacher with the policy that "
            "sampled, and that is then not the student."
        )


def check_k_step(k: int, args: OnPolicyConfig) -> None:
    """Raises `InputError` for K-step returns with λ < 1, which needs rewards (see `ops.rewards_from_returns`), or with
    an average reward for each token, where they hold the rewards of one in K."""
    lam = getattr(args, "lam", 1.0)
    if k > 1 and lam != 1.0:
        raise InputError(f"k = {k} gives K-step returns, which PPO can only use whole: set lam to 1 (it is {lam}).")
    if k > 1 and getattr(args, "average_reward", "none") != "none":
        raise InputError(
            f"k = {k} gives K-step returns, the sum of one in {k} tokens' rewards. Less an average for each token "
            "they would prefer long texts: set average_reward to 'none', as the preset ketchup does."
        )
