"""The teacher's rewards against slow loops over the model's own logits."""

import dataclasses
from itertools import product

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from rlkd_trl.errors import InputError
from rlkd_trl.prompts import PromptTemplate, PromptTemplates
from rlkd_trl.rewards import LogLikelihoodReward, LogRatioReward, RewardInputs, RewardModel, TeacherForcingReward
from rlkd_trl.students.policy import Policy
from rlkd_trl.teachers import Teacher, TeacherPanel
from tests.models.reference import FAMILIES, pad_completions, pad_prompts
from tests.rewards.reference import log_probability, logits_of, teacher_forcing, teacher_forcing_sum, value
from tests.tiny_models import EOS, MODELS, tiny_llama, tiny_t5, word_tokenizer

PROMPTS = ["w3 w4 w5", "w6", "w3 w4 w5", "w7 w8 w9 w10 w11", "w6", "w12 w13"]
# Ended, truncated, one token of either kind, and EOS in the middle, which a trainer never produces.
COMPLETIONS = [[4, 5, 6, 1], [7, 8, 9, 10, 11], [1], [12], [13, 14, 15, 16, 17, 1], [5, 1, 6]]
# Sums of a few float32 numbers of size 10, each within 1e-6 of it.
FLOAT32 = {"rtol": 1e-5, "atol": 3e-5}


def assert_rewards(rewards, expected):
    assert len(rewards) == len(expected)
    for tensor_T, numbers in zip(rewards, expected, strict=True):
        assert tensor_T.dtype == torch.float32 and tensor_T.dim() == 1
        torch.testing.assert_close(tensor_T, torch.tensor(numbers), **FLOAT32)


def expected_rewards(model, tokenizer, prompts=PROMPTS, completions=COMPLETIONS, **kwargs):
    return [
        teacher_forcing(logits_of(model, tokenizer, prompt, ids), ids, ended=ids[-1] == EOS, **kwargs)
        for prompt, ids in zip(prompts, completions, strict=True)
    ]


def expected_sums(model, tokenizer, prompts=PROMPTS, completions=COMPLETIONS, **kwargs):
    return [
        teacher_forcing_sum(logits_of(model, tokenizer, prompt, ids), ids, ended=ids[-1] == EOS, **kwargs)
        for prompt, ids in zip(prompts, completions, strict=True)
    ]


def templates_of(*jinja: str, rename=None) -> PromptTemplates:
    return PromptTemplates([PromptTemplate(f"t{i}", text) for i, text in enumerate(jinja)], rename)


@pytest.fixture(scope="module", params=list(MODELS))
def model(request):
    return MODELS[request.param]()


@pytest.mark.parametrize("kind, gamma, k", product(("max", "expected", "soft"), (1.0, 0.9), (1, 2, 4)))
def test_teacher_forcing_token_by_token(model, tokenizer, kind, gamma, k):
    reward = TeacherForcingReward(model, tokenizer, value=kind, gamma=gamma, k=k)
    assert_rewards(
        reward.score_tokens(PROMPTS, COMPLETIONS), expected_rewards(model, tokenizer, kind=kind, gamma=gamma, k=k)
    )


def test_soft_value_at_another_temperature(tokenizer):
    model = tiny_llama()
    reward = TeacherForcingReward(model, tokenizer, value="soft", tau=0.3)
    assert_rewards(reward.score_tokens(PROMPTS, COMPLETIONS), expected_rewards(model, tokenizer, kind="soft", tau=0.3))


@pytest.mark.parametrize("k", [1, 3])
def test_rewards_telescope_to_the_log_likelihood(model, tokenizer, k):
    """Σ r = V_1 + log p(y | x) for γ = 1, value="soft", τ = 1 and an ended completion. For k = 1 only."""
    reward = TeacherForcingReward(model, tokenizer, value="soft", k=k)
    rewards = reward.score_tokens(PROMPTS, COMPLETIONS)
    for prompt, ids, rewards_T in zip(PROMPTS, COMPLETIONS, rewards, strict=True):
        if ids[-1] != EOS:
            continue
        z_TV = logits_of(model, tokenizer, prompt, ids)
        log_p = sum(log_probability(z_V, token) for z_V, token in zip(z_TV, ids, strict=False))
        identity = value(z_TV[0], "soft") + log_p
        if k == 1 or len(ids) == 1:
            assert float(rewards_T.sum()) == pytest.approx(identity, abs=1e-4)
        else:
            assert abs(float(rewards_T.sum()) - identity) > 0.1, "k steps read fewer terms"


def test_log_likelihood_token_by_token(model, tokenizer):
    expected = [
        [log_probability(z_V, token) for z_V, token in zip(logits_of(model, tokenizer, p, ids), ids, strict=False)]
        for p, ids in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    assert_rewards(LogLikelihoodReward(model, tokenizer).score_tokens(PROMPTS, COMPLETIONS), expected)


def test_called_by_trl_it_returns_sums(model, tokenizer):
    reward = TeacherForcingReward(model, tokenizer, gamma=0.9)
    texts = ["anything"] * len(PROMPTS)  # it scores the ids
    sums = reward(
        prompts=PROMPTS, completions=texts, completion_ids=COMPLETIONS, trainer_state=object(), log_metric=print
    )
    assert all(type(s) is float for s in sums)
    assert sums == pytest.approx(expected_sums(model, tokenizer, gamma=0.9), abs=1e-4)


def test_called_without_ids_it_explains():
    with pytest.raises(InputError, match="completion_ids"):
        TeacherForcingReward(tiny_llama(), word_tokenizer())(prompts=["w3"], completions=["w4"])


def test_the_name_that_trl_logs():
    assert TeacherForcingReward(tiny_llama(), word_tokenizer()).__name__ == "TeacherForcingReward"


def test_equal_prompts_are_read_once(tokenizer):
    model = tiny_t5(tied=True)
    reward = TeacherForcingReward(model, tokenizer)
    rows = []
    model.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    reward.score_tokens(PROMPTS, COMPLETIONS)
    assert sum(rows) == len(set(PROMPTS)) == 4
    rows.clear()
    reward(prompts=PROMPTS, completions=PROMPTS, completion_ids=COMPLETIONS, group=["a", "b", "a", "c", "b", "d"])
    assert sum(rows) == 4


def test_equal_prompts_of_different_rows_are_not_confused(tokenizer):
    """The templates may read a column in which they differ."""
    model = tiny_llama()
    reward = TeacherForcingReward(model, tokenizer, templates=templates_of("{{ prompt }} {{ topic }}"))
    sums = reward(prompts=["w3", "w3"], completions=None, completion_ids=[[4, 1], [4, 1]], topic=["w5", "w6"])
    expected = expected_rewards(model, tokenizer, ["w3 w5", "w3 w6"], [[4, 1], [4, 1]])
    assert sums == pytest.approx([sum(numbers) for numbers in expected], abs=1e-4)
    assert sums[0] != pytest.approx(sums[1], abs=1e-3)


def test_rows_with_long_arrays_are_not_confused(tokenizer):
    """numpy abbreviates a long array's text: the two rows differ only where it prints an ellipsis."""
    import numpy

    first, second = numpy.full(5000, 3), numpy.full(5000, 3)
    second[2500] = 4
    model = tiny_llama()
    templates = templates_of("{{ prompt }} w{{ tokens[2500] }}")
    reward = TeacherForcingReward(model, tokenizer, templates=templates)
    sums = reward(prompts=["w3", "w3"], completions=None, completion_ids=[[4, 1], [4, 1]], tokens=[first, second])
    expected = expected_rewards(model, tokenizer, ["w3 w3", "w3 w4"], [[4, 1], [4, 1]])
    assert sums == pytest.approx([sum(numbers) for numbers in expected], abs=1e-4)


def test_an_empty_completion_has_no_reward(tokenizer):
    rewards = TeacherForcingReward(tiny_llama(), tokenizer).score_tokens(["w3", "w4"], [[], [5, 1]])
    assert [len(r) for r in rewards] == [0, 2]


def test_only_empty_completions(tokenizer):
    rewards = TeacherForcingReward(tiny_t5(tied=True), tokenizer).score_tokens(["w3", "w4"], [[], []])
    assert [len(r) for r in rewards] == [0, 0]


def test_nothing_to_score(tokenizer):
    assert TeacherForcingReward(tiny_llama(), tokenizer).score_tokens([], []) == []


def test_unequal_numbers_of_prompts_and_completions(tokenizer):
    with pytest.raises(InputError, match="2 prompts for 1 completions"):
        TeacherForcingReward(tiny_llama(), tokenizer).score_tokens(["w3", "w4"], [[5]])


@pytest.mark.parametrize(
    "family, prompts, completions, message",
    [
        (
            "gpt2",
            ["w3 " * 28],
            [[4, 5, 6, 7]],
            "positions for 32 tokens, too few for a prompt of 29 and a completion of 4",
        ),
        ("bart", ["w3 " * 40], [[4]], "positions for 32 tokens, too few for a prompt of 41: shorten prompts"),
        ("bart", ["w3", "w4"], [[4], [5] * 32], "positions for completions of 31 tokens, too few for one of 32"),
        ("t5-tied", ["w3"], [[4, 32]], "has the token id 32, and the teacher has ids from 0 to 31"),
        ("t5-tied", ["w3"], [[-100, 4]], "has the token id -100"),
        ("t5-tied", "w3", [[4], [5]], "The prompts are one text, 'w3': give a list"),
    ],
)
def test_what_a_teacher_cannot_read(family, prompts, completions, message, tokenizer):
    """In TRL's trainers nothing else looks at it before."""
    reward = TeacherForcingReward(FAMILIES[family](), tokenizer)
    if family == "gpt2":
        assert len(reward.score_tokens(prompts, [[4, 5, 6]])[0]) == 3  # 29 + 3 tokens are as many as it has positions
    for read in (reward.score_tokens, lambda prompts, ids: reward(prompts, completion_ids=ids)):
        with pytest.raises(InputError, match=message):
            read(prompts, completions)


def test_a_second_eos_id_ends_a_completion_too(tokenizer):
    model = tiny_llama()
    model.generation_config.eos_token_id = [EOS, 9]
    (rewards,) = TeacherForcingReward(model, tokenizer).score_tokens(["w3"], [[4, 9]])
    expected = teacher_forcing(logits_of(model, tokenizer, "w3", [4, 9]), [4, 9], ended=True)
    torch.testing.assert_close(rewards, torch.tensor(expected), **FLOAT32)


@pytest.mark.parametrize(
    "wrong", [{"value": "mean"}, {"k": 0}, {"tau": 0.0}, {"gamma": 1.1}, {"gamma": -0.1}, {"tau": -1.0}]
)
def test_wrong_settings(tokenizer, wrong):
    with pytest.raises(InputError, match=str(next(iter(wrong.values())))):
        TeacherForcingReward(tiny_llama(), tokenizer, **wrong)


def test_a_loaded_model_needs_its_tokenizer():
    with pytest.raises(InputError, match="processing_class"):
        TeacherForcingReward(tiny_llama())


def test_a_directory_brings_its_own_tokenizer(tmp_path, tokenizer):
    model = tiny_t5(tied=False)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rewards = TeacherForcingReward(str(tmp_path)).score_tokens(PROMPTS, COMPLETIONS)
    assert_rewards(rewards, expected_rewards(model, tokenizer))


# Templates and several teachers.


def test_the_mean_over_templates(tokenizer):
    model = tiny_t5(tied=True)
    jinja = ["w20 {{ source }}", "{{ source }} w21 w22 ||| {{ target }}", "w23 {{ source }} w24"]
    rewards = TeacherForcingReward(model, tokenizer, templates=templates_of(*jinja)).score_tokens(PROMPTS, COMPLETIONS)
    asked = [("w20 {}",), ("{} w21 w22",), ("w23 {} w24",)]
    each = [
        expected_rewards(model, tokenizer, [text.format(prompt) for prompt in PROMPTS], COMPLETIONS)
        for (text,) in asked
    ]
    mean = [[sum(r) / 3 for r in zip(*tokens, strict=True)] for tokens in zip(*each, strict=True)]
    assert_rewards(rewards, mean)


def test_the_weighted_mean_over_teachers(tokenizer):
    teachers = [tiny_t5(tied=True, seed=1), tiny_t5(tied=False, seed=2)]
    panel = TeacherPanel([Teacher(m, tokenizer) for m in teachers], teacher_weights=[1.0, 3.0])
    rewards = TeacherForcingReward(panel).score_tokens(PROMPTS, COMPLETIONS)
    each = [expected_rewards(m, tokenizer) for m in teachers]
    mean = [[(a + 3 * b) / 4 for a, b in zip(*tokens, strict=True)] for tokens in zip(*each, strict=True)]
    assert_rewards(rewards, mean)


def test_a_list_of_teachers_counts_equally(tokenizer):
    teachers = [tiny_llama(seed=1), tiny_llama(seed=2)]
    rewards = TeacherForcingReward(teachers, tokenizer).score_tokens(PROMPTS, COMPLETIONS)
    each = [expected_rewards(m, tokenizer) for m in teachers]
    assert_rewards(
        rewards, [[(a + b) / 2 for a, b in zip(*tokens, strict=True)] for tokens in zip(*each, strict=True)]
    )


def test_teachers_times_templates(tokenizer):
    teachers = [Teacher(tiny_llama(seed=s), tokenizer) for s in (1, 2)]
    panel = TeacherPanel(teachers, templates_of("w3 {{ x }}", "w4 {{ x }}"), teacher_weights=[3, 1])
    # 3/4 and 1/4, each over two templates.
    assert panel.weights == pytest.approx([0.375, 0.375, 0.125, 0.125])
    assert [(s.teacher, s.template_index) for s in panel.scorers] == [(t, q) for t in teachers for q in (0, 1)]


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0]])
def test_one_weight_per_teacher(tokenizer, weights):
    teachers = [Teacher(tiny_llama(), tokenizer)] * 2
    with pytest.raises(InputError, match="2 teachers"):
        TeacherPanel(teachers, teacher_weights=weights)


@pytest.mark.parametrize("weights", [[1.0, -1.0], [0.0, 1.0], [2.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_weights_are_shares(tokenizer, weights):
    teachers = [Teacher(tiny_llama(), tokenizer)] * 2
    with pytest.raises(InputError, match="must be positive"):
        TeacherPanel(teachers, teacher_weights=weights)


def test_no_teacher():
    with pytest.raises(InputError, match="0 teachers"):
        TeacherPanel([])


def questions(tokenizer, templates, row):
    return TeacherPanel([Teacher(tiny_llama(), tokenizer)], templates).questions(row)


def test_what_a_row_is_asked(tokenizer):
    two = templates_of("ask {{ source }}", "{{ source }}? ||| {{ target }}")
    assert questions(tokenizer, None, {"prompt": "w3", "source": "w4"}) == ["w3"]
    assert questions(tokenizer, two, {"prompt": "w3"}) == ["ask w3", "w3?"]
    # The column itself comes before the student's prompt.
    assert questions(tokenizer, two, {"prompt": "p", "source": "s", "id": 7}) == ["ask s", "s?"]
    # The column is missing: the prompt takes its place.
    assert questions(tokenizer, two, {"prompt": "p", "id": 7}) == ["ask p", "p?"]
    # So does the source text, where the templates call it something else; it comes before the prompt.
    other = templates_of("ask {{ document }}")
    assert questions(tokenizer, other, {"prompt": "p", "source": "s"}) == ["ask s"]
    assert questions(tokenizer, other, {"prompt": "p", "source": "s", "document": "d"}) == ["ask d"]
    # Of two columns, neither is guessed.
    with pytest.raises(InputError, match="title"):
        questions(tokenizer, templates_of("{{ title }} {{ document }}"), {"prompt": "p", "document": "d"})


def test_renamed_columns(tokenizer):
    renamed = templates_of("ask {{ source }}", rename={"mr": "source"})
    assert questions(tokenizer, renamed, {"prompt": "p", "mr": "m"}) == ["ask m"]
    assert questions(tokenizer, renamed, {"prompt": "p"}) == ["ask p"]


def test_renamed_columns_reach_the_reward(tokenizer):
    model = tiny_llama()
    reward = TeacherForcingReward(model, tokenizer, templates=templates_of("w9 {{ source }}", rename={"mr": "source"}))
    sums = reward(prompts=["w3", "w4"], completions=None, completion_ids=[[5, 1], [6]], mr=["w7", "w8"])
    assert sums == pytest.approx(expected_sums(model, tokenizer, ["w9 w7", "w9 w8"], [[5, 1], [6]]), abs=1e-4)


def test_references_never_reach_a_template(tokenizer):
    row = {"prompt": "p", "source": "s", "references": ["the answer"]}
    with pytest.raises(InputError, match="references"):
        questions(tokenizer, templates_of("{{ source }} {{ references[0] }}"), row)
    with pytest.raises(InputError, match="references"):
        questions(tokenizer, templates_of("{{ source }}{% for r in references %}{{ r }}{% endfor %}"), row)
    # In the target it may stand: that part is not run.
    assert questions(tokenizer, templates_of("{{ source }} ||| {{ references[0] }}"), row) == ["s"]
    # Nor do they make a bare prompt a row.
    assert questions(tokenizer, templates_of("ask {{ x }}"), {"prompt": "p", "references": ["r"]}) == ["ask p"]


def test_a_conversation_is_read_through_the_chat_template():
    model, tokenizer = tiny_llama(), word_tokenizer(append_eos=False)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}w9{% endif %}"
    )
    reward = TeacherForcingReward(model, tokenizer)
    conversation = [{"role": "w3", "content": "w4 w5"}]
    sums = reward(prompts=[conversation], completions=None, completion_ids=[[6, 1]])
    expected = teacher_forcing(logits_of(model, tokenizer, "w3 w4 w5 w9", [6, 1]), [6, 1], ended=True)
    assert sums == pytest.approx([sum(expected)], abs=1e-4)


def test_a_chat_template_that_writes_bos_does_not_get_a_second_one():
    """As Llama's: both the chat template and the tokenizer add it. The student is asked with one."""
    tokenizer = word_tokenizer(append_eos=False)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="w3 $A", special_tokens=[("w3", 3)])
    tokenizer.bos_token = "w3"
    tokenizer.chat_template = "{{ bos_token }} {% for m in messages %}{{ m['content'] }} {% endfor %}"
    conversation = [{"role": "user", "content": "w4 w5"}]
    assert tokenizer.apply_chat_template(conversation, return_dict=False) == [3, 4, 5]
    model = tiny_llama()
    reward = TeacherForcingReward(model, tokenizer)
    sums = reward(prompts=[conversation], completions=None, completion_ids=[[6, 1]])
    expected = teacher_forcing(logits_of(model, tokenizer, "w4 w5", [6, 1]), [6, 1], ended=True)
    assert sums == pytest.approx([sum(expected)], abs=1e-4)


# The student's side.


@pytest.mark.parametrize("name", list(MODELS))
def test_log_ratio_of_a_teacher_to_itself_is_zero(tokenizer, name):
    """Though it gives ids that are never sampled some probability, by which the student's is renormalised."""
    prompts, completions, index_B = (
        ["w3 w4 w5", "w6"],
        [[4, 5, 1], [6], [7, 8, 9, 10], [1]],
        torch.tensor([0, 1, 1, 0]),
    )
    policy = Policy(MODELS[name](), tokenizer)
    ids_BT, mask_BT = pad_completions(completions)
    ids_PS, mask_PS = pad_prompts(policy.model, tokenizer(prompts)["input_ids"])
    inputs = RewardInputs(
        rows=[{"prompt": prompt} for prompt in prompts],
        prompt_index_B=index_B,
        completion_ids_BT=ids_BT,
        completion_mask_BT=mask_BT,
        ended_B=torch.tensor([ids[-1] == EOS for ids in completions]),
        student_logps_BT=policy(ids_PS, mask_PS, index_B, ids_BT, mask_BT).logps_BT.detach(),
        forbidden_V=policy.forbidden_V,
    )

    def log_ratio_to(teacher, inputs):
        model = RewardModel([LogRatioReward(teacher, tokenizer)])
        return model.rewards(inputs, model.score(inputs)).rewards_BT

    torch.testing.assert_close(log_ratio_to(MODELS[name](), inputs), torch.zeros(4, 4), rtol=0, atol=1e-5)
    assert log_ratio_to(MODELS[name](seed=5), inputs)[mask_BT].abs().min() > 1e-4
    # If nothing were forbidden, the teacher's log Z would be left over.
    everything = dataclasses.replace(inputs, forbidden_V=None)
    assert log_ratio_to(MODELS[name](), everything)[mask_BT].max() < -0.01


def test_log_ratio_needs_the_student(tokenizer):
    with pytest.raises(InputError, match="log_ratio"):
        LogRatioReward(tiny_llama(), tokenizer).score_tokens(["w3"], [[4, 1]])


def test_a_subclass_with_rewards_of_its_own_may_read_the_students_log_probs():
    """The trainers leave them out where no reward says that it reads them."""

    class Scaled(LogLikelihoodReward):
        def rewards(self, scores, inputs):
            return super().rewards(scores, inputs) - inputs.student_logps_BT

    class Renamed(LogLikelihoodReward):
        pass

    assert Scaled.reads_student_log_probs and LogRatioReward.reads_student_log_probs
    assert not Renamed.reads_student_log_probs and not TeacherForcingReward.reads_student_log_probs
