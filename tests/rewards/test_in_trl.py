"""The rewards in TRL's own trainers."""

import pytest
import torch
from datasets import Dataset

from rlkd_trl.rewards import TeacherForcingReward
from rlkd_trl.rewards.sequence_rewards import length
from tests.rewards.reference import logits_of, teacher_forcing_sum
from tests.rewards.test_teacher_rewards import templates_of
from tests.tiny_models import EOS, tiny_llama, word_tokenizer
from tests.trainers.tiny_runs import build, prompts, samples_instead, teacher_reward


class RecordedReward(TeacherForcingReward):
    """Keeps what the trainer passed and got."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = []

    def __call__(self, prompts, completions=None, completion_ids=None, **kwargs):
        sums = super().__call__(prompts, completions, completion_ids, **kwargs)
        self.calls.append((prompts, [list(ids) for ids in completion_ids], kwargs, sums))
        return sums


@pytest.mark.parametrize("algorithm", ["RLOO", "GRPO"])
def test_as_a_reward_function_of_trls_trainers(algorithm, tmp_path):
    """Two steps; the rewards that TRL logs are the sums over the teacher's own logits."""
    import trl

    tokenizer = word_tokenizer(append_eos=False)
    teacher = tiny_llama(seed=5)
    reward = RecordedReward(teacher, tokenizer, templates=templates_of("w9 {{ source }} w10"), gamma=0.9)
    sources = ["w3 w4", "w5", "w6 w7 w8", "w11"]
    config = getattr(trl, f"{algorithm}Config")(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=4,
        beta=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        seed=0,
    )
    trainer = getattr(trl, f"{algorithm}Trainer")(
        model=tiny_llama(seed=6),
        reward_funcs=[reward, length],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [f"{s} w12" for s in sources], "source": sources}),
        processing_class=tokenizer,
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()

    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(reward.calls) == len(logs) == 2
    for (asked, completion_ids, kwargs, sums), log in zip(reward.calls, logs, strict=True):
        assert len(asked) == 4 and asked[0] == asked[1] == f"{kwargs['source'][0]} w12"
        expected = []
        for source, ids in zip(kwargs["source"], completion_ids, strict=True):
            z_TV = logits_of(teacher, tokenizer, f"w9 {source} w10", ids)
            expected.append(teacher_forcing_sum(z_TV, ids, ended=ids[-1] == EOS, gamma=0.9))
        assert sums == pytest.approx(expected, abs=1e-4)
        mean_length = sum(map(len, completion_ids)) / 4
        assert log["rewards/RecordedReward/mean"] == pytest.approx(sum(expected) / 4, abs=1e-4)
        assert log["reward"] == pytest.approx(sum(expected) / 4 + mean_length, abs=1e-4)
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


SETTINGS = [{}, {"gamma": 0.8}, {"value": "soft", "tau": 0.5}, {"value": "expected", "k": 2}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_completion_that_was_cut_off_is_bootstrapped(settings):
    """Without EOS at the end, γ V(s_{n+1}) is added; with it, nothing. Three prompts, lengths 1 to 4."""
    tokenizer, teacher = word_tokenizer(append_eos=False), tiny_llama(seed=5)
    reward = TeacherForcingReward(teacher, tokenizer, **settings)
    questions = ["w3 w4", "w5", "w6 w7 w8", "w5"]
    completion_ids = [[5, 9, EOS], [4, 4, 7, 20], [EOS], [11]]
    names = {"value": "kind"}
    settings = {names.get(name, name): setting for name, setting in settings.items()}
    expected = [
        teacher_forcing_sum(logits_of(teacher, tokenizer, prompt, ids), ids, ended=ids[-1] == EOS, **settings)
        for prompt, ids in zip(questions, completion_ids, strict=True)
    ]
    sums = reward(prompts=questions, completions=None, completion_ids=completion_ids)
    assert sums == pytest.approx(expected, abs=1e-4)


def test_the_advantages_here_are_those_of_trls_leave_one_out(tmp_path):
    """Of an ended and a cut-off completion of one prompt: in RLOO, each one's reward minus the other's."""
    settings = {"per_device_train_batch_size": 2, "max_steps": 1, "average_reward": "none"}
    trainer = build("rloo-sequence", tmp_path, data=prompts(1), **settings)
    completions = [[5, 9, EOS], [4, 4, 7, 20]]
    samples_instead(trainer, *completions)
    rollout = trainer.make_rollout([trainer.train_dataset[0]])
    text = trainer.train_dataset[0]["prompt"]
    ours = rollout.advantages_BT[:, 0].tolist()
    one, other = teacher_reward()(prompts=[text, text], completions=None, completion_ids=completions)
    assert abs(one - other) > 1, "a difference to be seen"
    assert ours == pytest.approx([one - other, other - one], abs=1e-4)
