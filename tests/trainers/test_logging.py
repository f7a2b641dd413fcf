import statistics

import pytest
import torch
from transformers import TrainerCallback

from tests.students.plain_forward import entropies, plain_forward, plain_values
from tests.tiny_models import EOS, MODELS, word_tokenizer
from tests.trainers.tiny_runs import METHODS, Recorder, build, prompts, run, samples_instead

EVERY_METHOD = {
    "loss",
    "learning_rate",
    "reward",
    "reward_std",
    "rewards/TeacherForcingReward",
    "teacher_nll",
    "entropy",
    "ratio",
    "clip_fraction",
    "approx_kl",
    "completions/mean_length",
    "completions/eos_rate",
    "completions/distinct",
    "grad_norm",
    "seconds/sample",
    "seconds/log_probs",
    "seconds/score",
    "seconds/update",
    "tokens_per_second",
}


@pytest.mark.parametrize("method", METHODS)
def test_everything_is_logged(method, tmp_path):
    plain = run(method, tmp_path, max_steps=1).logs[0]
    penalised = run(method, tmp_path, max_steps=1, beta=0.1).logs[0]
    wanted = EVERY_METHOD | ({"value_loss", "explained_variance"} if method == "ppo" else set())
    assert wanted <= plain.keys()
    assert wanted | {"kl", "beta"} <= penalised.keys()
    assert "kl" not in plain
    if method != "ppo":
        assert not {"value_loss", "explained_variance"} & plain.keys()
    assert all(isinstance(value, float | int) for value in penalised.values())


def first_and_second(prompts, completions, completion_ids, **columns):
    """1 for the completion of three tokens, 3 for the one of four."""
    return [1.0 if len(ids) == 3 else 3.0 for ids in completion_ids]


COMPLETIONS = ([5, 9, EOS], [4, 4, 7, 20])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_numbers_of_a_rollout_worked_out_by_hand(accumulation, tmp_path):
    trainer = build(
        "ppo",
        tmp_path,
        reward=first_and_second,
        data=prompts(1),
        per_device_train_batch_size=2 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        lam=1.0,
        normalize_advantages=False,
        max_grad_norm=0.0,
        vf_coef=0.5,
    )
    samples_instead(trainer, *COMPLETIONS)
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    entry = recorder.logs[0]
    assert entry["reward"] == pytest.approx(2.0)  # (1 + 3) / 2
    assert entry["reward_std"] == pytest.approx(1.0)  # sqrt(((1−2)² + (3−2)²) / 2)
    assert entry["rewards/first_and_second"] == pytest.approx(2.0)
    assert entry["completions/mean_length"] == pytest.approx(3.5)
    assert entry["completions/eos_rate"] == pytest.approx(0.5)
    # Values are 0, so returns are the reward to go: 1 on three tokens, 3 on four. The critic's targets are those
    # normalised, its output is 0: ½ of their variance, 1.
    assert entry["value_loss"] == pytest.approx(0.5)
    assert entry["explained_variance"] == pytest.approx(0.0, abs=1e-6)
    # At ratio 1 the policy loss is −(3 · 1 + 4 · 3) / 7.
    assert entry["loss"] == pytest.approx(-15 / 7 + 0.5 * 0.5, rel=1e-5)
    assert (entry["ratio"], entry["clip_fraction"]) == (pytest.approx(1.0, abs=1e-5), 0.0)

    student = MODELS["t5-tied"]()
    prompt = word_tokenizer()(prompts(1)[0]["prompt"])["input_ids"]
    per_token = torch.cat([entropies(student, prompt, completion) for completion in COMPLETIONS])
    assert entry["entropy"] == pytest.approx(float(per_token.detach().mean()), rel=1e-4)
    gradient = torch.cat([g.flatten() for g in recorder.gradients[0].values() if g is not None])
    assert entry["grad_norm"] == pytest.approx(float(gradient.norm()), rel=1e-5)
    seconds = sum(entry[f"seconds/{phase}"] for phase in ("sample", "log_probs", "score", "update"))
    assert entry["tokens_per_second"] == pytest.approx(7 / seconds, rel=1e-3)
    assert 0 < entry["seconds/update"] < 60
    assert "teacher_nll" not in entry


def test_explained_variance_is_of_the_tokens_in_the_loss(tmp_path):
    """Returns are 3, 2 and 2; the other completion was cut off, and is left out."""

    def per_token(inputs):
        return torch.tensor([[1.0, 0.0, 2.0, 0.0], [5.0, -5.0, 5.0, 9.0]])

    trainer = build("ppo", tmp_path, reward=per_token, data=prompts(1), per_device_train_batch_size=2, max_steps=1,
                    lam=1.0, mask_truncated_completions=True, average_reward="none")  # fmt: skip
    torch.manual_seed(11)
    torch.nn.init.normal_(trainer.model.value_head.weight)
    samples_instead(trainer, *COMPLETIONS)
    prompt = word_tokenizer()(prompts(1)[0]["prompt"])["input_ids"]
    values = plain_values(trainer.model.model, trainer.model.value_head, prompt, COMPLETIONS[0])[:3].tolist()
    trainer.train()
    errors = [target - value for target, value in zip((3, 2, 2), values, strict=True)]
    expected = 1 - statistics.pvariance(errors) / statistics.pvariance((3, 2, 2))
    assert trainer.state.log_history[0]["explained_variance"] == pytest.approx(expected, rel=1e-4)


def test_teacher_nll_is_the_teachers_own(tmp_path):
    trainer = build("rloo-sequence", tmp_path, data=prompts(1), per_device_train_batch_size=2, max_steps=1)
    samples_instead(trainer, *COMPLETIONS)
    trainer.train()
    teacher = MODELS["t5-tied"](seed=5)
    prompt = word_tokenizer()(prompts(1)[0]["prompt"])["input_ids"]
    nll = 0.0
    for completion in COMPLETIONS:
        # Over the whole vocabulary: the teacher is as it is, not restricted to what the student may sample.
        logps = torch.log_softmax(plain_forward(teacher, prompt, completion)[0].double(), dim=-1)
        nll -= float(logps[range(len(completion)), completion].sum().detach())
    assert trainer.state.log_history[0]["teacher_nll"] == pytest.approx(nll / 7, rel=1e-4)


def test_logs_are_means_since_the_last_log(tmp_path):
    every = run("rloo-token", tmp_path / "every", max_steps=4, logging_steps=1).logs
    pairs = run("rloo-token", tmp_path / "pairs", max_steps=4, logging_steps=2).logs
    assert len(every) == 4 and len(pairs) == 2
    for name in ("loss", "reward", "entropy", "teacher_nll", "completions/mean_length"):
        for i, entry in enumerate(pairs):
            mean = (every[2 * i][name] + every[2 * i + 1][name]) / 2
            assert entry[name] == pytest.approx(mean, rel=1e-4, abs=1e-6)


def test_completions_are_printed_on_request(tmp_path, capsys):
    trainer = build("ppo", tmp_path, max_steps=1, log_completions=True, num_completions_to_print=3)
    trainer.train()
    assert len(trainer.sample_table) == 3
    printed = capsys.readouterr().out
    assert trainer.sample_table[0]["prompt"].split()[0] in printed
    row = trainer.sample_table[0]
    assert set(row) == {"prompt", "completion", "reward", "tokens", "ended"}


def test_evaluation_does_not_swallow_training_metrics(tmp_path):
    trainer = build("rloo-token", tmp_path, max_steps=2, logging_steps=2, eval_strategy="steps", eval_steps=1,
                    eval_data=prompts(4, seed=3))  # fmt: skip
    trainer.train()
    history = trainer.state.log_history
    assert sum("eval_reward" in entry for entry in history) == 2
    assert sum("reward" in entry for entry in history) == 1
    assert not any("reward" in entry for entry in history if "eval_reward" in entry)


def test_evaluation_under_another_name_does_not_swallow_them_either(tmp_path):
    trainer = build("rloo-token", tmp_path / "evaluated", max_steps=2, logging_steps=2)
    quiet = run("rloo-token", tmp_path / "quiet", max_steps=2, logging_steps=2)

    class EvaluateAfterTheFirstStep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                trainer.evaluate(prompts(2, seed=3), metric_key_prefix="test")

    trainer.add_callback(EvaluateAfterTheFirstStep())
    trainer.train()
    test_entry = next(entry for entry in trainer.state.log_history if "test_reward" in entry)
    assert "reward" not in test_entry
    train_entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert train_entry["reward"] == pytest.approx(quiet.logs[0]["reward"], rel=1e-6)
