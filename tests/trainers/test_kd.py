"""Distillation on divergences: its update, where sequences come from, its checkpoints, its settings."""

import copy
from collections.abc import Iterable
from functools import partial

import pytest
import torch
from datasets import Dataset

from rlkd_trl import KDConfig, TeacherForcingReward
from rlkd_trl.errors import InputError
from rlkd_trl.ops.divergences import DIVERGENCES
from rlkd_trl.prompts import PromptTemplate, PromptTemplates
from rlkd_trl.teachers import Teacher, TeacherPanel
from tests.students.plain_forward import ALLOWED, plain_forward
from tests.tiny_models import EOS, MODELS, UNK, VOCAB, word_tokenizer
from tests.trainers.plain_distillation import Asked, asked_twice, assert_gradients, kd_loss
from tests.trainers.plain_update import samples_of
from tests.trainers.tiny_runs import (
    Recorder,
    assert_same_weights,
    build,
    largest_difference,
    pairs,
    prompts,
    run,
    snapshot,
    teacher_reward,
)

ON_DATA = {"divergence": "forward_kl", "sequences": "data", "lmbda": 0.0, "data": pairs(32)}
FROM_TEACHER = {"sequences": "teacher", "lmbda": 0.0}

# ---- the update in loops

CASES = {
    "word level": ("t5-tied", ON_DATA),
    "hinton": ("llama", {**ON_DATA, "distillation_temperature": 2.0, "alpha": 0.6, "num_generations": 4}),
    "sequence level": ("glm", {**ON_DATA, "alpha": 0.0, "num_generations": 1}),
    "truncated targets masked": (
        "t5-untied",
        {**ON_DATA, "alpha": 0.5, "mask_truncated_completions": True, "max_completion_length": 5},
    ),
    "on-policy JSD": ("t5-untied", {"divergence": "jsd", "beta": 0.3, "temperature": 0.7}),
    "on-policy reverse KL": ("glm", {"divergence": "reverse_kl", "distillation_temperature": 0.5}),
    "total variation on teacher samples": ("llama", {**FROM_TEACHER, "divergence": "tvd", "temperature": 1.3}),
    "hard labels of the teacher": ("t5-tied", {**FROM_TEACHER, "divergence": "forward_kl", "alpha": 0.2}),
    "skewed": ("t5-tied", {"divergence": "skew_kl", "skew": 0.2}),
    "skewed reverse": ("llama", {"divergence": "skew_reverse_kl", "mask_truncated_completions": True}),
    "ensemble of probabilities": ("t5-tied", {"divergence": "jsd", "distillation_temperature": 2.0}),
    "ensemble of logits": ("llama", {**FROM_TEACHER, "divergence": "forward_kl", "ensemble": "logits"}),
}
QUICK = ("word level", "hinton", "sequence level", "on-policy JSD", "ensemble of probabilities")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_gradients_are_those_of_the_papers_loops(case, tmp_path):
    """Both passes over a rollout, in two micro-batches."""
    family, settings = CASES[case]
    reward, teachers = asked_twice(family) if "ensemble" in case else (None, [Asked(MODELS[family](seed=5))])
    trainer = build(
        "kd",
        tmp_path,
        family=family,
        reward=reward,
        num_iterations=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
        optim="sgd",
        **{"learning_rate": 0.03, **settings},
    )
    students = [copy.deepcopy(trainer.model.model)]
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    after_one_step = copy.deepcopy(trainer.model)
    after_one_step.load_state_dict(recorder.weights[0])
    students.append(after_one_step.model)

    samples = samples_of(recorder.rollouts[0])
    assert recorder.rollouts[1] is recorder.rollouts[0], "two passes over one rollout"
    assert {sample.ended for sample in samples} == {True, False}
    from_data = settings.get("sequences") == "data"
    assert not from_data or any(UNK in sample.completion for sample in samples)
    for step, student in enumerate(students):
        loss = kd_loss(trainer.args, samples, teachers, student, from_data=from_data)
        assert_gradients(recorder, step, loss, student)
    assert recorder.logs[1]["loss"] != pytest.approx(recorder.logs[0]["loss"], rel=1e-3)


@pytest.mark.parametrize("settings", [ON_DATA, FROM_TEACHER, {}], ids=["data", "teacher", "student"])
def test_update_does_not_depend_on_how_the_batch_is_cut(settings, tmp_path):
    settings = {"max_steps": 3, "max_grad_norm": 0.01, "optim": "sgd", "learning_rate": 1.0, **settings}
    whole = run("kd", tmp_path / "whole", **settings)
    parts = run("kd", tmp_path / "parts", per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings)
    assert min(entry["grad_norm"] for entry in whole.logs) > 0.01, "gradient clipping must be active"
    lengths = whole.rollouts[0].completion_mask_BT.sum(dim=1)
    assert len(set(lengths.tolist())) > 2, "the test needs ragged completions"
    for ours, theirs in zip(parts.rollouts, whole.rollouts, strict=True):
        assert torch.equal(ours.completion_ids_BT, theirs.completion_ids_BT)
    for ours, theirs in zip(parts.logs, whole.logs, strict=True):
        for name in ("loss", "grad_norm", "divergence", "completions/mean_length", "completions/eos_rate"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    assert_same_weights(parts.weights[-1], whole.weights[-1], rtol=1e-4, atol=1e-5)
    assert largest_difference(whole.weights[-1], whole.weights[0]) > 1e-3


@pytest.mark.parametrize("family", ["t5-tied", pytest.param("llama", marks=pytest.mark.slow)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(divergence, family, tmp_path):
    reward = TeacherForcingReward(MODELS[family](), word_tokenizer())
    entry = run("kd", tmp_path, family=family, reward=reward, divergence=divergence, max_steps=1).logs[0]
    assert entry["divergence"] == pytest.approx(0, abs=1e-5)  # of another teacher usually 0.02
    assert entry["grad_norm"] < 1e-4


def test_the_teacher_is_frozen_and_gets_no_gradient(tmp_path):
    trainer = build("kd", tmp_path, reward=teacher_reward())
    teacher = trainer.panel.scorers[0].teacher.model
    before = snapshot(teacher)
    trainer.train()
    assert_same_weights(snapshot(teacher), before)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_hard_labels_alone_need_no_teacher(alpha, tmp_path):
    trainer = build("kd", tmp_path, reward=teacher_reward(), **ON_DATA, alpha=alpha)
    calls = []
    for module in trainer.panel.scorers[0].teacher.model.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert bool(calls) == (alpha > 0)
    logged = {"divergence", "cross_entropy"} & trainer.state.log_history[0].keys()
    assert logged == ({"cross_entropy"} if alpha == 0 else {"divergence", "cross_entropy"})


# ---- where sequences come from

TWO_TARGETS = Dataset.from_list([{"prompt": "w7 w8", "references": ["w3 w4", "w5 w6"]}])


def texts_of_rollouts(trainer, data: Dataset, numbers: Iterable[int]) -> list[str]:
    """The first completion of each of these rollouts of a run, without updates in between."""
    texts = []
    for number in numbers:
        trainer.rollout_state.micro_step = number
        trainer.make_rollout(list(data))
        texts.append(trainer.sample_table[0]["completion"])
    return texts


def of_one_prompt(tmp_path, **settings):
    single = {"per_device_train_batch_size": 1, "num_generations": 1, "max_completion_length": 3}
    return build("kd", tmp_path, **{**ON_DATA, "data": TWO_TARGETS, **single, **settings})


def test_lmbda_decides_between_data_and_student(tmp_path):
    """By chance for each rollout, whatever else is drawn in it: both targets come up among the data's."""
    references = TWO_TARGETS[0]["references"]

    def texts(numbers: Iterable[int], **settings) -> list[str]:
        return texts_of_rollouts(of_one_prompt(tmp_path, **settings), TWO_TARGETS, numbers)

    assert all(text in references for text in texts(range(4), lmbda=0.0))
    assert not any(text in references for text in texts(range(4), lmbda=1.0))
    found = texts(range(40), lmbda=0.5)
    from_data = [text for text in found if text in references]
    assert 0.25 < len(from_data) / 40 < 0.75  # usually 0.5 ± 0.08
    assert 0.2 < from_data.count(references[0]) / len(from_data) < 0.8
    assert texts(reversed(range(8)), lmbda=0.5) == found[7::-1], (
        "a rollout's number decides, not what was drawn before"
    )
    other_seed = texts(range(8), lmbda=0.5, seed=1)
    assert [text in references for text in other_seed] != [text in references for text in found[:8]]


def test_every_reference_is_drawn_for_its_own_prompt(tmp_path):
    data = pairs(4)
    trainer = build("kd", tmp_path, **{**ON_DATA, "data": data}, max_completion_length=9)
    tokenizer, seen = word_tokenizer(), [set() for _ in data]
    for number in range(12):
        trainer.rollout_state.micro_step = number
        rollout = trainer.make_rollout(list(data))
        assert rollout.prompt_index_B.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        for sample, p in zip(samples_of(rollout), rollout.prompt_index_B.tolist(), strict=True):
            seen[p].add(tuple(sample.completion))
    for found, row in zip(seen, data, strict=True):
        assert found == {tuple(tokenizer(text)["input_ids"]) for text in row["references"]}  # EOS at the end
    assert max(map(len, seen)) > 1


def test_long_targets_are_cut_without_an_eos(tmp_path):
    data = Dataset.from_list([{"prompt": "w7", "references": ["w3 w4 w5 w6"]}, {"prompt": "w8", "references": ["w9"]}])
    trainer = build(
        "kd", tmp_path, **{**ON_DATA, "data": data}, per_device_train_batch_size=4, max_completion_length=3
    )
    rollout = trainer.make_rollout(list(data))
    assert rollout.completion_ids_BT[1:3].tolist() == [[3, 4, 5], [9, EOS, 0]]
    assert rollout.completion_mask_BT[1:3].tolist() == [[True, True, True], [True, True, False]]
    assert rollout.ended_B.tolist() == [False, False, True, True]


def test_what_targets_end_with_ends_the_students_texts_too(tmp_path):
    """Also where its generation config has another EOS only."""
    model = MODELS["t5-tied"]()
    model.generation_config.eos_token_id = 5
    trainer = build("kd", tmp_path, model=model, **ON_DATA)
    assert trainer.policy.eos_ids == [5, EOS]
    rollout = trainer.make_rollout([trainer.train_dataset[i] for i in range(4)])
    last = [
        int(row[mask][-1]) for row, mask in zip(rollout.completion_ids_BT, rollout.completion_mask_BT, strict=True)
    ]
    assert rollout.ended_B.tolist() == [token in (5, EOS) for token in last]
    assert EOS in last


def test_what_the_student_should_not_say_is_read_but_not_learnt(tmp_path):
    """A word that the tokenizer does not know, and a sentinel, which is never sampled."""
    data = Dataset.from_list([{"prompt": "w7", "references": ["w3 unheard w4 <extra_id_0> w5"]}])
    trainer = of_one_prompt(tmp_path, data=data, max_completion_length=9, alpha=0.5)
    rollout = trainer.make_rollout(list(data))
    assert rollout.completion_ids_BT.tolist() == [[3, UNK, 4, VOCAB - 1, 5, EOS]]
    assert rollout.completion_mask_BT.all()
    assert rollout.loss_mask_BT.tolist() == [[True, False, True, False, True, True]]
    trainer.train()
    assert trainer.state.log_history[0]["cross_entropy"] > 0


def test_an_unknown_token_that_is_the_eos_too_is_learnt(tmp_path):
    """GPT-2's is."""
    trainer = of_one_prompt(tmp_path)
    trainer.processing_class.unk_token = trainer.processing_class.eos_token
    assert trainer.make_rollout(list(TWO_TARGETS)).loss_mask_BT.all()


def greedy(model, prompt: list[int], length: int) -> list[int]:
    ids = []
    while len(ids) < length and EOS not in ids:
        with torch.no_grad():
            logits = plain_forward(model, prompt, ids)[0][-1]
        ids.append(max(ALLOWED, key=lambda v, logits=logits: float(logits[v])))
    return ids


@pytest.mark.parametrize("family", ["t5-tied", pytest.param("llama", marks=pytest.mark.slow)])
def test_teachers_take_turns_each_asked_in_its_own_way(family, tmp_path):
    """At a temperature of almost 0, where sampling is greedy."""
    templates = PromptTemplates(
        [PromptTemplate("before", "w9 {{ source }}"), PromptTemplate("after", "{{ source }} w10")]
    )
    teachers = [
        Teacher(MODELS[family](seed=5), word_tokenizer()),
        Teacher(MODELS[family](seed=6), word_tokenizer(), max_prompt_length=3),
    ]
    reward = TeacherForcingReward(TeacherPanel(teachers, templates))
    settings = {**FROM_TEACHER, "temperature": 1e-4, "num_generations": 1, "per_device_train_batch_size": 2}
    trainer = build("kd", tmp_path, family=family, reward=reward, max_completion_length=4, **settings)
    rows, tokenizer = list(prompts(2)), word_tokenizer()
    ways = [(teacher, question) for teacher in teachers for question in ("w9 {}", "{} w10")]
    for number in range(5):
        teacher, question = ways[number % 4]
        trainer.rollout_state.micro_step = number
        found = [sample.completion for sample in samples_of(trainer.make_rollout(rows))]
        # 3 tokens less the template's word and EOS leave the source's first word
        words = None if teacher.max_prompt_length is None else 1
        texts = [question.format(" ".join(row["prompt"].split()[:words])) for row in rows]
        asked = tokenizer(texts)["input_ids"]
        assert found == [greedy(teacher.model, ids, 4) for ids in asked]
        assert found != [greedy(trainer.model.model, ids, 4) for ids in asked], "the student's own"


# ---- checkpoints

MIXTURE = {**ON_DATA, "lmbda": 0.5, "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "seed": 3}


@pytest.mark.parametrize("sequences", ["data", pytest.param("teacher", marks=pytest.mark.slow)])
def test_resumed_run_ends_where_an_uninterrupted_one_does(sequences, tmp_path):
    settings = {**MIXTURE, "sequences": sequences}
    whole = build("kd", tmp_path / "whole", **settings)
    whole.train()
    resumed = build("kd", tmp_path / "resumed", model=MODELS["t5-tied"](seed=3), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    sources = [[e["student_samples"] for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    assert sources[0] == sources[1] and set(sources[0][2:]) == {0.0, 1.0}
    assert_same_weights(snapshot(resumed.model), snapshot(whole.model), rtol=1e-4, atol=1e-5)
    assert resumed.cost().generated_tokens == whole.cost().generated_tokens
    assert resumed.cost().optimizer_steps == 6


# ---- precision


@pytest.mark.parametrize("family", ["t5-tied", pytest.param("llama", marks=pytest.mark.slow)])
def test_bf16_is_close(family, tmp_path):
    settings = {**ON_DATA, "family": family, "optim": "sgd", "max_steps": 1}
    full, half = (run("kd", tmp_path, bf16=bf16, **settings) for bf16 in (False, True))
    assert torch.equal(half.rollouts[0].completion_ids_BT, full.rollouts[0].completion_ids_BT)
    for name in ("loss", "grad_norm", "divergence"):
        assert half.logs[0][name] == pytest.approx(full.logs[0][name], rel=0.05)
        assert half.logs[0][name] != full.logs[0][name]
    assert all(tensor.dtype != torch.bfloat16 for tensor in half.weights[0].values())


@pytest.mark.parametrize("settings", [FROM_TEACHER, {}], ids=["teacher", "student"])
def test_bf16_learns_from_its_own_samples(settings, tmp_path):
    """The divergence and the gradient of what was sampled are those of loops in float64, but for the rounding."""
    recorder = run("kd", tmp_path, family="llama", bf16=True, max_steps=1, max_grad_norm=0.0, **settings)
    student, samples = MODELS["llama"](), samples_of(recorder.rollouts[0])
    args, teachers = recorder.trainer.args, [Asked(MODELS["llama"](seed=5))]
    loss = kd_loss(args, samples, teachers, student, from_data=False)
    parameters = dict(student.named_parameters())
    of_loss = torch.autograd.grad(loss, list(parameters.values()))
    expected = torch.cat([gradient.flatten() for gradient in of_loss])
    found = torch.cat([recorder.gradients[0][f"model.{name}"].flatten() for name in parameters])
    # bfloat16 has three digits. Seen: 0.1 %, 1 %, 0.9997.
    assert recorder.logs[0]["divergence"] == pytest.approx(float(loss.detach()), rel=0.01)
    assert recorder.logs[0]["divergence"] != pytest.approx(float(loss.detach()), rel=1e-6), "it was in bfloat16"
    assert float(found.norm()) == pytest.approx(float(expected.norm()), rel=0.03)
    assert float(torch.cosine_similarity(found, expected, dim=0)) > 0.999


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "hellinger"}, "divergence = 'hellinger': choose one of forward_kl, reverse_kl, jsd, tvd"),
        ({"sequences": "student"}, "sequences = 'student': choose one of data, teacher"),
        ({"ensemble": "median"}, "ensemble = 'median': choose one of probabilities, logits"),
        ({"divergence": "jsd", "beta": 1.1}, "beta = 1.1 is out of range"),
        ({"divergence": "jsd", "beta": -0.1}, "beta = -0.1 is out of range"),
        ({"divergence": "forward_kl", "beta": 0.5}, "beta = 0.5 is a setting of divergence 'jsd'"),
        ({"divergence": "skew_kl", "skew": 1.0}, "skew = 1.0 is out of range"),
        ({"divergence": "skew_reverse_kl", "skew": -0.1}, "skew = -0.1 is out of range"),
        ({"divergence": "jsd", "skew": 0.1}, "skew = 0.1 is a setting of the skewed KLs"),
        ({"distillation_temperature": 0.0}, "distillation_temperature = 0.0 is out of range"),
        ({"alpha": 1.1}, "alpha = 1.1 is out of range"),
        ({"alpha": -0.1}, "alpha = -0.1 is out of range"),
        ({"lmbda": 1.1}, "lmbda = 1.1 is out of range"),
        ({"lmbda": -0.1}, "lmbda = -0.1 is out of range"),
        ({"lmbda": 0.5, "alpha": 0.9}, "lmbda = 0.5 with alpha = 0.9: the student's own samples"),
        ({"alpha": 0.0, "divergence": "tvd"}, "divergence = 'tvd' has no effect with alpha = 0: leave it out"),
        ({"alpha": 0.0, "distillation_temperature": 2.0}, "distillation_temperature = 2.0 has no effect with alpha"),
        ({"lmbda": 1.0, "sequences": "teacher"}, "sequences = 'teacher' has no effect with lmbda = 1"),
        ({"max_generated_tokens": 0}, "max_generated_tokens = 0 is out of range"),
        ({"max_cpu_seconds": 0.0}, "max_cpu_seconds = 0.0 is out of range"),
        ({"top_k": 5}, "top_k=5"),
        ({"num_generations": 3, "per_device_train_batch_size": 8}, "not divisible by num_generations 3"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, message, tmp_path):
    with pytest.raises(InputError) as refused:
        KDConfig(output_dir=str(tmp_path), **settings)
    assert message in str(refused.value)


def test_the_ends_of_the_ranges_are_allowed(tmp_path):
    config = partial(KDConfig, output_dir=str(tmp_path))
    assert config().divergence_settings == {} and config().num_generations == 1
    assert config(divergence="jsd").divergence_settings == {"beta": 0.5}  # GKD
    assert config(divergence="skew_kl").divergence_settings == {"skew": 0.1}  # DistiLLM
    for beta in (0.0, 1.0):
        assert config(divergence="jsd", beta=beta).divergence_settings == {"beta": beta}
    assert config(divergence="skew_reverse_kl", skew=0.0).divergence_settings == {"skew": 0.0}
    assert config(alpha=0.0, lmbda=0.0).alpha == 0 and config(alpha=1.0, lmbda=1.0).lmbda == 1


def test_data_without_targets(tmp_path):
    with pytest.raises(InputError, match="name their column with --target_column"):
        build("kd", tmp_path, **{**ON_DATA, "data": prompts(32)})
    empty = prompts(8).add_column("references", [["w3"]] * 7 + [[]])
    with pytest.raises(InputError, match="row 8 has none"):
        build("kd", tmp_path, **{**ON_DATA, "data": empty})
    texts = prompts(8).add_column("references", ["w3 w4"] * 8)
    with pytest.raises(InputError, match="Row 1: `references` is a text, not a list of texts"):
        build("kd", tmp_path, **{**ON_DATA, "data": texts})
    for settings in ({"lmbda": 1.0}, {"sequences": "teacher"}):  # then targets are not needed
        build("kd", tmp_path, **{**ON_DATA, "data": prompts(32), **settings})


@pytest.mark.parametrize("method", ["kd", "all-actions"])
def test_different_tokenizers(method, tmp_path):
    other = word_tokenizer()
    other.add_tokens(["w99"])
    with pytest.raises(InputError, match="w99"):
        build(method, tmp_path, reward=TeacherForcingReward(MODELS["t5-tied"](), other))
    other = word_tokenizer()
    other.eos_token = "w5"
    with pytest.raises(InputError, match="EOS"):
        build(method, tmp_path, reward=TeacherForcingReward(MODELS["t5-tied"](), other))


@pytest.mark.parametrize("method", ["kd", "all-actions"])
def test_no_prompt_column_and_too_few_prompts(method, tmp_path):
    with pytest.raises(InputError, match=r"prompt.*its columns are: mr"):
        build(method, tmp_path, data=Dataset.from_dict({"mr": ["a"] * 8}))
    with pytest.raises(InputError, match=r"takes 4 prompts.*the data has 3"):
        build(method, tmp_path, data=prompts(3))
