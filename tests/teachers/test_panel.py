"""How the scorers of a panel are weighed, and whose an example is, against loops over each model's own logits."""

import pytest
import torch

from rlkd_trl.errors import InputError
from rlkd_trl.prompts import PromptTemplate, PromptTemplates
from rlkd_trl.rewards import LogLikelihoodReward, RewardInputs, RewardModel, TeacherForcingReward
from rlkd_trl.teachers import Teacher, TeacherPanel
from rlkd_trl.teachers.routing import Routing
from tests.models.tokenizers_of_all_kinds import character_tokenizer
from tests.rewards.reference import log_probability, logits_of, teacher_forcing
from tests.tiny_models import EOS, tiny_llama, word_tokenizer

ROWS = [
    {"prompt": "w3 w4 w5", "references": ["w8 w9", "w3"], "expert": "runs/two", "ask": "first"},
    {"prompt": "w6", "references": [], "expert": "one", "ask": "second"},
    {"prompt": "w7 w8", "references": ["w4"], "expert": "two", "ask": "second"},
]
COMPLETIONS = [[4, 5, 1], [6, 1], [7, 8, 9], [10, 1], [11, 12, 1], [13, 1]]  # two of each row
FLOAT32 = {"rtol": 1e-5, "atol": 3e-5}
SEEDS = (1, 2, 3)


@pytest.fixture(scope="module")
def models():
    return [tiny_llama(seed=seed) for seed in SEEDS]


def panel_of(models, templates=None, **settings) -> TeacherPanel:
    return TeacherPanel([Teacher(model, word_tokenizer()) for model in models], templates, **settings)


def inputs_of(rows=ROWS) -> RewardInputs:
    width = max(map(len, COMPLETIONS))
    return RewardInputs(
        rows=rows,
        prompt_index_B=torch.arange(len(COMPLETIONS)) // 2,
        completion_ids_BT=torch.tensor([ids + [0] * (width - len(ids)) for ids in COMPLETIONS]),
        completion_mask_BT=torch.tensor([[t < len(ids) for t in range(width)] for ids in COMPLETIONS]),
        ended_B=torch.tensor([ids[-1] == EOS for ids in COMPLETIONS]),
    )


def log_probs(model, prompt: str, ids: list[int]) -> list[float]:
    rows = logits_of(model, word_tokenizer(), prompt, ids)
    return [log_probability(z_V, token) for z_V, token in zip(rows, ids, strict=False)]


def loss(model, prompt: str, text: str) -> float:
    """Cross-entropy per token of a reference, EOS included."""
    ids = [*word_tokenizer()(text, add_special_tokens=False)["input_ids"], EOS]
    return -sum(log_probs(model, prompt, ids)) / len(ids)


def median_distance(models, number: int, prompt: str, ids: list[int]) -> float:
    rows = [log_probs(model, prompt, ids) for model in models]
    middle = [sorted(of_token)[1] for of_token in zip(*rows, strict=True)]  # of three
    return sum(abs(a - b) for a, b in zip(rows[number], middle, strict=True)) / len(ids)


def expected_shares(models, given: list[float]) -> list[list[float]]:
    """By completion, MT-BERT's weights over their sum."""
    shares = []
    for b, ids in enumerate(COMPLETIONS):
        row = ROWS[b // 2]
        if row["references"]:
            losses = [loss(model, row["prompt"], row["references"][0]) for model in models]
        else:
            losses = [median_distance(models, k, row["prompt"], ids) for k in range(len(models))]
        factors = [weight / (1 + value) for weight, value in zip(given, losses, strict=True)]
        shares.append([factor / sum(factors) for factor in factors])
    return shares


def test_rewards_and_nll_weighed_per_example(models):
    """With and without a reference."""
    panel = panel_of(models, teacher_weights=[1, 1, 2], weighting="per_example")
    shares = expected_shares(models, [1, 1, 2])
    assert max(abs(of_row[0] - of_row[1]) for of_row in shares) > 0.01, "the test needs weights that differ"
    reward_model, inputs = RewardModel([TeacherForcingReward(panel)]), inputs_of()
    result = reward_model.rewards(inputs, reward_model.score(inputs))
    nll_BT = result.teacher_nll_BT(inputs.completion_mask_BT)
    for b, ids in enumerate(COMPLETIONS):
        prompt = ROWS[b // 2]["prompt"]
        each = [
            teacher_forcing(logits_of(model, word_tokenizer(), prompt, ids), ids, ended=ids[-1] == EOS)
            for model in models
        ]
        expected = [
            sum(w * r for w, r in zip(shares[b], of_token, strict=True)) for of_token in zip(*each, strict=True)
        ]
        torch.testing.assert_close(result.rewards_BT[b, : len(ids)], torch.tensor(expected), **FLOAT32)
        logps = [log_probs(model, prompt, ids) for model in models]
        expected = [
            -sum(w * p for w, p in zip(shares[b], of_token, strict=True)) for of_token in zip(*logps, strict=True)
        ]
        torch.testing.assert_close(nll_BT[b, : len(ids)], torch.tensor(expected), **FLOAT32)


def test_templates_of_one_teacher_are_weighed_by_the_same_rule(models):
    templates = two_templates()
    panel = panel_of(models[:1], templates, template_weights=[3, 1], weighting="per_example")
    assert panel.weights == pytest.approx([0.75, 0.25])
    losses = [loss(models[0], question, "w8 w9") for question in ("w9 w3 w4 w5", "w3 w4 w5")]
    factors = [3 / (1 + losses[0]), 1 / (1 + losses[1])]
    scores = RewardModel([LogLikelihoodReward(panel)]).score(inputs_of())[id(panel)]
    found = [float(of_scorer.weight[0]) for of_scorer in scores]
    assert found == pytest.approx([factor / sum(factors) for factor in factors], abs=1e-6)


def test_weights_by_validation_loss(models):
    panel = panel_of(models[:2], teacher_weights=[1, 2])
    rows = [ROWS[0], ROWS[2]]
    losses = panel.mean_reference_losses(rows)
    expected = [sum(loss(m, row["prompt"], row["references"][0]) for row in rows) / 2 for m in models[:2]]
    assert losses == pytest.approx(expected, abs=1e-5)
    panel.weigh_by([1.0, 3.0])  # 1/2 : 2/4
    assert panel.weights == pytest.approx([0.5, 0.5])
    with pytest.raises(InputError, match="finite"):
        panel.weigh_by([1.0, float("nan")])


def two_templates() -> PromptTemplates:
    return PromptTemplates([PromptTemplate("first", "w9 {{ prompt }}"), PromptTemplate("second", "{{ prompt }}")])


def test_a_reference_may_be_a_text_alone(models):
    panel = panel_of(models[:2])
    losses = panel.reference_losses([{"prompt": "w6", "references": "w8 w9"}, {"prompt": "w6", "references": None}])
    expected = [loss(model, "w6", "w8 w9") for model in models[:2]]
    assert losses[:, 0].tolist() == pytest.approx(expected, abs=1e-5) and losses[:, 1].tolist() == [0, 0]


def test_validation_losses_are_of_the_scorers_own_rows(models):
    panel = panel_of(models[:2], two_templates(), routing=Routing(None, "ask"))
    rows = [ROWS[0], {**ROWS[0], "prompt": "w6"}, ROWS[2]]  # of the templates first, first and second
    losses = panel.mean_reference_losses(rows)
    expected = []
    for model in models[:2]:
        expected.append((loss(model, "w9 w3 w4 w5", "w8 w9") + loss(model, "w9 w6", "w8 w9")) / 2)
        expected.append(loss(model, "w7 w8", "w4"))
    assert losses == pytest.approx(expected, abs=1e-5)
    with pytest.raises(InputError, match="No row is of scorer 2 of 4"):
        panel.mean_reference_losses(rows[:2])


def test_those_asked_are_weighed_as_if_there_were_no_others(models):
    """Each example's template is asked of all teachers: their shares are those of a panel of that template alone."""
    templates = two_templates()
    routed = panel_of(models, templates, weighting="per_example", routing=Routing(None, "ask"))
    for k, template in enumerate(templates):
        rows = [{**row, "ask": template.name} for row in ROWS]
        alone = panel_of(models, PromptTemplates([template]), weighting="per_example")
        found, expected = (
            [
                of_scorer.weight
                for of_scorer in RewardModel([LogLikelihoodReward(panel)]).score(inputs_of(rows))[id(panel)]
            ]
            for panel in (routed, alone)
        )
        torch.testing.assert_close(torch.stack(found[k::2]), torch.stack(expected))
        assert (torch.stack(found[1 - k :: 2]) == 0).all()


@pytest.mark.parametrize("settings", [{"weighting": "per_example"}, {"routing": Routing("expert", None, ["a", "b"])}])
def test_teachers_with_different_tokenizers_are_not_compared(models, settings):
    teachers = [Teacher(models[0], word_tokenizer()), Teacher(models[1], character_tokenizer())]
    with pytest.raises(InputError, match="The teachers have different tokenizers"):
        TeacherPanel(teachers, **settings)
    with pytest.raises(InputError, match="The teachers have different tokenizers"):
        TeacherPanel(teachers).mean_reference_losses(ROWS[:1])


@pytest.mark.parametrize("weighting", ["fixed", "per_example"])
def test_each_example_is_read_by_its_owner_alone(models, weighting):
    routing = Routing("expert", None, ["runs/one", "runs/two"])
    panel = panel_of(models[:2], routing=routing, weighting=weighting)
    read = [[], []]  # by model, how many texts each forward pass read

    def counts(own: list[int]):
        return lambda _, args, kwargs: own.append(len(args[0] if args else kwargs["input_ids"]))

    layers = [model.base_model for model in models[:2]]
    hooks = [
        of_model.register_forward_pre_hook(counts(own), with_kwargs=True)
        for of_model, own in zip(layers, read, strict=True)
    ]
    inputs, reward = inputs_of(), LogLikelihoodReward(panel)
    reward_model = RewardModel([reward])
    result = reward_model.rewards(inputs, reward_model.score(inputs))
    for hook in hooks:
        hook.remove()
    # a prompt and two completions, two prompts and four; per example two prompts with a reference more
    assert [sum(own) for own in read] == ([3, 6] if weighting == "fixed" else [3, 10])
    for b, ids in enumerate(COMPLETIONS):
        owner = models[[1, 0, 1][b // 2]]
        expected = torch.tensor(log_probs(owner, ROWS[b // 2]["prompt"], ids))
        torch.testing.assert_close(result.rewards_BT[b, : len(ids)], expected, **FLOAT32)
    states = panel.states(ROWS, inputs.prompt_index_B, inputs.completion_ids_BT, inputs.completion_mask_BT)
    assert (states[0][[0, 1, 4, 5]] == 0).all() and (states[1][[2, 3]] == 0).all()
    assert (states[0][[2, 3], 0] != 0).any() and (states[1][[0, 1, 4, 5], 0] != 0).any()


def test_each_example_has_its_own_template(models):
    templates = two_templates()
    panel = panel_of(models[:2], templates, routing=Routing("expert", "ask", ["one", "two"]))
    owned = panel.owned([{**ROWS[0], "expert": "two"}, *ROWS[1:]])
    # scorers: one first, one second, two first, two second
    assert owned.long().argmax(dim=0).tolist() == [2, 1, 3] and owned.sum(dim=0).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "row, teachers, message",
    [
        ({"expert": "three"}, ["one", "two"], "Data, row 2: `expert` is 'three', which names no teacher of: one, two"),
        ({"expert": "x"}, ["a/x", "b/x"], "names 2 teachers of: a/x, b/x"),
        ({"other": "x"}, ["one", "two"], "there is no `expert`; its columns are: other"),
    ],
)
def test_an_owner_that_is_not_known(row, teachers, message):
    with pytest.raises(InputError, match=message):
        Routing("expert", None, teachers).check([{"expert": teachers[0]}, row], [], "Data")


def test_unknown_weighting(models):
    with pytest.raises(InputError, match="Unknown weighting 'best'"):
        panel_of(models[:2], weighting="best")
