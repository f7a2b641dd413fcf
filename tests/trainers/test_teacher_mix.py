"""Samples from a mixture of student and teacher, and the weights that make up for it."""

import math

import pytest
import torch

from rlkd_trl import AllActionsKDConfig, AllActionsKDTrainer
from rlkd_trl.errors import InputError
from rlkd_trl.ops.all_actions import mixture_importance
from rlkd_trl.prompts import PromptTemplate, PromptTemplates
from rlkd_trl.teachers import Teacher, TeacherPanel
from tests.tiny_models import MODELS, word_tokenizer
from tests.trainers.tiny_runs import prompts, teacher_reward

ROWS = [{"prompt": "w5 w6"}, {"prompt": "w7"}]


def trainer_with(output_dir, family="t5-untied", panel=None, **settings) -> AllActionsKDTrainer:
    settings = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 5, **settings}
    args = AllActionsKDConfig(output_dir=str(output_dir), **settings)
    panel = teacher_reward(family).panel if panel is None else panel
    return AllActionsKDTrainer(MODELS[family](), panel, args, prompts(8), processing_class=word_tokenizer())


def test_importance_worked_by_hand():
    # π = 0.2, p = 0.6, α = 0.25: p̃ = 0.15 + 0.15 = 0.3, w = 2/3; π = 0.5, p = 0: w = 0.5 / 0.375 = 4/3, the most
    student_BT = torch.tensor([[math.log(0.2), math.log(0.5), math.nan]])
    teacher_BT = torch.tensor([[math.log(0.6), -math.inf, math.nan]])
    mask_BT = torch.tensor([[True, True, False]])
    found_BT = mixture_importance(student_BT, teacher_BT, mask_BT, weight=0.25)
    assert found_BT.tolist() == [pytest.approx([2 / 3, 4 / 3, 0.0])]


def test_a_model_mixed_with_itself_needs_no_weights():
    logps_BT = -torch.rand(2, 3)
    mask_BT = torch.ones(2, 3, dtype=torch.bool)
    torch.testing.assert_close(mixture_importance(logps_BT, logps_BT, mask_BT, weight=0.2), torch.ones(2, 3))


@pytest.mark.parametrize("family", ["t5-untied", "llama"])
def test_the_rollouts_weights_are_those_of_plain_forward_passes(family, tmp_path):
    trainer = trainer_with(tmp_path, family, teacher_mix=0.3)
    rollout = trainer.make_rollout(ROWS)
    allowed_V = ~trainer.policy.forbidden_V
    for b in range(4):
        prompt_ids = word_tokenizer()(ROWS[b // 2]["prompt"])["input_ids"]
        ids = rollout.completion_ids_BT[b][rollout.completion_mask_BT[b]].tolist()
        probabilities = []
        for model in (trainer.policy.model, trainer.panel.scorers[0].teacher.model):
            with torch.no_grad():
                if model.config.is_encoder_decoder:
                    decoder_ids = torch.tensor([[model.config.decoder_start_token_id, *ids[:-1]]])
                    logits = model(input_ids=torch.tensor([prompt_ids]), decoder_input_ids=decoder_ids).logits[0]
                else:
                    logits = model(input_ids=torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
            chosen = logits.double().masked_fill(~allowed_V, -math.inf).softmax(-1)[range(len(ids)), ids]
            probabilities.append(chosen)
        student, teacher = probabilities
        expected = student / (0.3 * teacher + 0.7 * student)
        torch.testing.assert_close(rollout.importance_BT[b, : len(ids)].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["t5-untied", pytest.param("llama", marks=pytest.mark.slow)])
def test_teachers_take_turns_each_asked_in_its_own_way(family, tmp_path):
    """Two teachers × two templates: each rollout is that of a trainer with the one whose turn it is, alone."""
    jinja = {"before": "w9 {{ source }}", "after": "{{ source }} w10"}
    templates = {name: PromptTemplate(name, text) for name, text in jinja.items()}
    teachers = [Teacher(MODELS[family](seed=seed), word_tokenizer()) for seed in (5, 6)]
    together = trainer_with(tmp_path, family, TeacherPanel(teachers, PromptTemplates(templates.values())),
                            teacher_mix=0.9)  # fmt: skip
    ways = [(teacher, template) for teacher in teachers for template in templates.values()]
    alone = [
        trainer_with(tmp_path, family, TeacherPanel([teacher], PromptTemplates([template])), teacher_mix=0.9)
        for teacher, template in ways
    ]
    for number in (0, 1, 2, 7):
        other = alone[(number + 1) % 4]
        for trainer in (together, alone[number % 4], other):
            trainer.rollout_state.micro_step = number
        found, expected = together.make_rollout(ROWS), alone[number % 4].make_rollout(ROWS)
        assert found.completion_ids_BT.tolist() == expected.completion_ids_BT.tolist()
        torch.testing.assert_close(found.importance_BT, expected.importance_BT, rtol=1e-5, atol=1e-6)
        assert other.make_rollout(ROWS).completion_ids_BT.tolist() != expected.completion_ids_BT.tolist()


def test_the_loss_is_weighted_token_by_token(tmp_path):
    """With one real weight each, the loss of doubled weights is doubled; of none, it is 0."""
    trainer = trainer_with(tmp_path, teacher_mix=0.3)
    rollout = trainer.make_rollout(ROWS)
    losses = [
        float(
            trainer.micro_batch_loss(
                trainer.model,
                rollout.with_(importance_BT=factor * rollout.importance_BT),
                tokens=torch.tensor(1.0),
                sequences=torch.tensor(1.0),
            )[0]
        )
        for factor in (1, 2, 0)
    ]
    assert losses[0] != 0
    assert losses[1:] == pytest.approx([2 * losses[0], 0.0])


def test_samples_change_with_the_mixture(tmp_path):
    alone, mixed = (trainer_with(tmp_path, teacher_mix=mix).make_rollout(ROWS) for mix in (0.0, 0.9))
    assert alone.importance_BT is None
    assert alone.completion_ids_BT.tolist() != mixed.completion_ids_BT.tolist()


@pytest.mark.parametrize(
    "settings, message",
    [({"teacher_mix": 1.0}, "teacher_mix = 1.0"), ({"teacher_mix": 0.2, "temperature": 0.7}, "needs temperature 1")],
)
def test_wrong_settings_are_refused(settings, message, tmp_path):
    with pytest.raises(InputError, match=message):
        AllActionsKDConfig(output_dir=str(tmp_path), **settings)
