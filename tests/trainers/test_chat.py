"""Training on chats is training on what transformers' `apply_chat_template` makes of them, word for word."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlkd_trl import ChatFormat, TeacherForcingReward
from rlkd_trl.errors import InputError
from rlkd_trl.evaluation.evaluate import evaluate_student
from rlkd_trl.models.loading import load_model
from rlkd_trl.prompts import PromptTemplates
from rlkd_trl.rewards import RewardModel
from rlkd_trl.rewards.sequence_rewards import reference_bleu, reference_rouge
from rlkd_trl.teachers import Teacher, TeacherPanel
from rlkd_trl.teachers.pseudo_labels import pseudo_labels
from rlkd_trl.trainers.supervised import SupervisedTrainer
from rlkd_trl.trainers.supervised_config import SupervisedConfig
from tests.tiny_models import CHAT_TEMPLATE, END, chat_tokenizer, tiny_llama
from tests.trainers.tiny_runs import (
    FULL_VOCABULARY_METHODS,
    METHODS,
    assert_same_weights,
    build,
    largest_difference,
    prompts,
    run,
    snapshot,
)

QUESTION = "w9 {{ source }} w10"


def plain_tokenizer():
    """Without a chat template; its EOS is the end of a turn. For prompts that have been through one already."""
    tokenizer = chat_tokenizer(None)
    tokenizer.eos_token = END
    return tokenizer


def talk(text: str, system: str | None = None) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": text}]


def through_template(text: str, system: str | None = None) -> str:
    return chat_tokenizer().apply_chat_template(talk(text, system), tokenize=False, add_generation_prompt=True)


def reward(tokenizer, chat: ChatFormat | None = None, templates=None) -> TeacherForcingReward:
    return TeacherForcingReward(tiny_llama(seed=5), tokenizer, chat=chat, templates=templates)


# Those that sample of the teacher, too.
OF_TEACHERS = {"kd": {"sequences": "teacher", "lmbda": 0.0}, "all-actions": {"teacher_mix": 0.5}}


def weights_of(
    method: str, output_dir, data: Dataset, tokenizer, scorer, chat=None, **more
) -> dict[str, torch.Tensor]:
    # The plain model ends with the turn's end; of the chat model, the trainer has to find that out.
    model = tiny_llama()
    model.generation_config.eos_token_id = 26
    settings = {"learning_rate": 1e-1, "max_steps": 2, "tokenizer": tokenizer, "chat": chat, **more}
    recorder = run(method, output_dir, family="llama", model=model, reward=scorer, data=data, **settings)
    assert recorder.trainer.policy.eos_ids == [26]
    return recorder.weights[-1]


@pytest.mark.slow(0.3)
@pytest.mark.parametrize(
    ("method", "more"),
    [*((method, {}) for method in (*METHODS, *FULL_VOCABULARY_METHODS)), *OF_TEACHERS.items()],
    ids=[*METHODS, *FULL_VOCABULARY_METHODS, "kd of the teacher's samples", "all-actions of a mixture"],
)
def test_texts_conversations_and_prompts_by_hand_train_the_same(method, more, tmp_path):
    """The teacher's questions are its own: a template's words inside of its own chat."""
    texts = prompts(16)
    system = "w11 w12"
    student, teacher = ChatFormat(system_prompt=system), ChatFormat(system_prompt="w13")
    expected = weights_of(
        method,
        tmp_path / "by hand",
        texts.map(lambda row: {"prompt": through_template(row["prompt"], system), "source": row["prompt"]}),
        plain_tokenizer(),
        reward(plain_tokenizer(), templates=PromptTemplates([through_template(QUESTION, "w13")])),
        **more,
    )
    asked = reward(chat_tokenizer(), teacher, PromptTemplates([QUESTION]))
    found = weights_of(method, tmp_path / "texts", texts, chat_tokenizer(), asked, student, **more)
    assert_same_weights(found, expected)
    conversations = texts.map(lambda row: {"prompt": talk(row["prompt"], system)})
    found = weights_of(method, tmp_path / "talks", conversations, chat_tokenizer(), asked, **more)
    assert_same_weights(found, expected)
    other = weights_of(
        method, tmp_path / "without", texts, chat_tokenizer(), asked, **more
    )  # without the system prompt
    assert largest_difference(other, expected) > 1e-4


def test_without_templates_the_teacher_gets_the_conversation_in_its_own_chat(tmp_path):
    """Two models, one tokenizer, two chat templates."""
    talks = [talk("w4 w5", "w11"), talk("w6")]
    template = "{% for m in messages %}w19 {{ m.content }} w26 {% endfor %}w20"
    tokenizer = chat_tokenizer(template)
    found = reward(tokenizer)(prompts=talks, completion_ids=[[5, 26], [7]])
    by_hand = ["w19 w11 w26 w19 w4 w5 w26 w20", "w19 w6 w26 w20"]
    plain = TeacherForcingReward(tiny_llama(seed=5), plain_tokenizer())
    plain.panel.scorers[0].teacher.model.generation_config.eos_token_id = [1, 26]
    assert found == pytest.approx(plain(prompts=by_hand, completion_ids=[[5, 26], [7]]), abs=1e-5)
    scores = reward(tokenizer).score_tokens(talks, [[5, 26], [7]])
    torch.testing.assert_close(scores[0], plain.score_tokens(by_hand, [[5, 26], [7]])[0])


@pytest.mark.parametrize("more", [{}, {"id": 1}])
def test_a_template_reads_the_messages_as_prompt(more):
    """Whatever other columns a row has; `source` is what the user said last."""
    by_role = PromptTemplates.inline("{% for m in prompt %}{{ m.role }} {{ m.content }} {% endfor %}")
    row = {"prompt": talk("w4 w5", "w11"), "references": ["w9"], **more}
    panel = reward(chat_tokenizer(), templates=by_role).panel
    assert panel.questions(row) == ["system w11 user w4 w5"]
    of_source = reward(chat_tokenizer(), templates=PromptTemplates.inline("w6 {{ source }}")).panel
    assert of_source.questions(row) == ["w6 w4 w5"]
    assert panel.questions({"prompt": talk("w4"), **more}) == ["user w4"]


def test_a_reward_of_ones_own_gets_each_completion_in_the_form_of_its_prompt(tmp_path):
    seen = []

    def watch(prompts, completions, **kwargs):
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    trainer = build(
        "rloo-token", tmp_path, family="llama", reward=watch, tokenizer=chat_tokenizer(), num_generations=2
    )
    trainer.make_rollout([{"prompt": "w4"}, {"prompt": talk("w5")}])
    forms = [(type(prompt), type(completion)) for prompt, completion in seen]
    assert forms == [(str, str)] * 2 + [(list, list)] * 2
    assert all(completion[0]["role"] == "assistant" for _, completion in seen[2:])


def test_the_end_of_the_turn_ends_samples_and_is_what_the_reward_takes_for_an_end(tmp_path):
    trainer = build(
        "rloo-token", tmp_path, family="llama", reward=reward(chat_tokenizer()), tokenizer=chat_tokenizer()
    )
    rollout = trainer.make_rollout([trainer.train_dataset[i] for i in range(4)])
    assert set(trainer.policy.eos_ids) == {1, 26}
    last = [
        int(ids[mask][-1]) for ids, mask in zip(rollout.completion_ids_BT, rollout.completion_mask_BT, strict=True)
    ]
    assert [token in (1, 26) for token in last] == rollout.ended_B.tolist()
    assert trainer.processing_class.eos_token == END


def test_a_saved_student_answers_chats_as_it_was_evaluated(tmp_path):
    """Plain `generate` on what the saved tokenizer's `apply_chat_template` makes of a conversation."""
    data = prompts(8, seed=3).add_column("references", [["w3"]] * 8)
    trainer = build(
        "rloo-sequence",
        tmp_path,
        family="llama",
        reward=reward(chat_tokenizer()),
        tokenizer=chat_tokenizer(),
        eval_data=data,
        chat=ChatFormat(system_prompt="w11"),
    )
    trainer.train()
    evaluated = evaluate_student(
        trainer.policy, trainer.processing_class, list(data), None, max_prompt_length=64, max_completion_length=6
    )
    trainer.save_model()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.eos_token == END
    answers = []
    for row in data:
        inputs = tokenizer.apply_chat_template(
            talk(row["prompt"], "w11"), add_generation_prompt=True, return_tensors="pt"
        )
        output = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(output, skip_special_tokens=True))
    assert answers == evaluated.outputs
    assert len(set(answers)) > 1, "answers must tell prompts apart"


def test_a_student_trained_without_its_chat_template_is_saved_without(tmp_path):
    trainer = build(
        "rloo-sequence",
        tmp_path,
        family="llama",
        reward=reward(plain_tokenizer(), ChatFormat("none")),
        tokenizer=_ending_turns(chat_tokenizer()),
        chat=ChatFormat("none"),
    )
    rollout = trainer.make_rollout([{"prompt": "w4 w5"}] * 4)
    assert rollout.prompt_ids_PS[0].tolist() == [4, 5]
    trainer.save_model()
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template is None


def _ending_turns(tokenizer):
    tokenizer.eos_token = END
    return tokenizer


def test_two_ends_of_a_turn_are_refused(tmp_path):
    """A teacher that is asked in a chat, and a student that is not, end with different tokens."""
    with pytest.raises(InputError, match="end a completion with different tokens: EOS is 26 for the teacher"):
        build("ppo", tmp_path, family="llama", reward=reward(chat_tokenizer()), tokenizer=chat_tokenizer(None))


def test_supervised_pairs_are_prompts_in_the_chat_and_targets_that_end_the_turn(tmp_path):
    texts = prompts(16)["prompt"]
    weights = []
    for name, tokenizer, write in (
        ("texts", chat_tokenizer(), lambda text: text),
        ("talks", chat_tokenizer(), talk),
        ("by hand", plain_tokenizer(), through_template),
    ):
        rows = [{"prompt": write(text), "target": "w5 w6"} for text in texts]
        args = SupervisedConfig(
            str(tmp_path / name), max_steps=2, learning_rate=1e-1, save_strategy="no", disable_tqdm=True
        )
        trainer = SupervisedTrainer(tiny_llama(), args, Dataset.from_list(rows), tokenizer)
        batch = trainer.data_collator([{"prompt": write("w4"), "target": "w5"}])
        assert batch["input_ids"].tolist() == [[23, 4, 26, 24, 5, 26]]
        assert batch["labels"].tolist() == [[-100, -100, -100, -100, 5, 26]]
        trainer.train()
        weights.append(snapshot(trainer.model))
    assert_same_weights(weights[0], weights[2])
    assert_same_weights(weights[1], weights[2])


def test_rewards_of_ones_own_get_conversations_as_in_trl(tmp_path):
    """Prompts as the data has them, completions as a message of the assistant; texts where prompts are texts."""
    seen = []

    def own(prompts, completions, **kwargs):
        seen.append((prompts[0], completions[0]))
        return [0.0] * len(prompts)

    for data in (prompts(16), prompts(16).map(lambda row: {"prompt": talk(row["prompt"])})):
        data = data.add_column("references", [["w3 w4"]] * 16)
        rewards = RewardModel([reward(chat_tokenizer()), own, reference_bleu, reference_rouge])
        trainer = build("rloo-token", tmp_path, family="llama", reward=rewards, data=data, tokenizer=chat_tokenizer())
        trainer.make_rollout([data[i] for i in range(4)])
        assert trainer.sample_table[0]["prompt"] == data[0]["prompt"]
    (text, completion), (messages, turn) = seen
    assert messages == talk(text)
    assert turn == [{"role": "assistant", "content": completion}]


def test_bad_prompts_are_named_by_their_row(tmp_path):
    for bad, message in (
        ([{"content": "w3", "role": None}], "Row 2 of the training data: Message 1 of a conversation has no role"),
        ([], r"Row 2 of the training data: `prompt` is \[\] \(list\), not text and not a conversation"),
    ):
        data = Dataset.from_list([{"prompt": talk("w3")}, {"prompt": bad}, *[{"prompt": talk("w4")}] * 8])
        with pytest.raises(InputError, match=message):
            build("ppo", tmp_path, family="llama", data=data, tokenizer=chat_tokenizer())


STRICT = (  # as those of many models: the roles have to alternate
    "{%- for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}" + CHAT_TEMPLATE.partition("-%}")[2]
)


@pytest.mark.parametrize(
    ("method", "strict", "place"),
    [
        ("ppo", "student", "Row 3 of the training data"),
        ("ppo", "teacher", "Row 3 of the training data"),
        ("kd", "student", "Row 2 of the evaluation data"),
        ("sft", "student", "Row 3 of the training data"),
    ],
)
def test_a_conversation_that_a_chat_template_refuses_is_named_by_its_row(method, strict, place, tmp_path):
    twice = [{"role": "user", "content": "w3"}, {"role": "user", "content": "w4"}]
    good, both = Dataset.from_list([{"prompt": talk("w3")}] * 8), [{"prompt": talk("w3")}, {"prompt": twice}]
    tokenizer, lenient = chat_tokenizer(STRICT), chat_tokenizer()
    with pytest.raises(InputError, match=f"{place}: The chat template of .* refuses a conversation: .*alternate"):
        if method == "sft":
            data = Dataset.from_list([good[0], *both]).add_column("target", ["w5"] * 3)
            SupervisedTrainer(tiny_llama(), SupervisedConfig(tmp_path), data, tokenizer)
            return
        data, held_out = Dataset.from_list([good[0], *both, *good]), None
        if "evaluation" in place:
            data, held_out = good, Dataset.from_list(both)
        student, teacher = (tokenizer, lenient) if strict == "student" else (lenient, tokenizer)
        settings = {"data": data, "eval_data": held_out, "tokenizer": student, "reward": reward(teacher)}
        build(method, tmp_path, family="llama", **settings)


def test_pseudo_labels_of_a_chat_teacher_are_plain_generates(tmp_path):
    model = tiny_llama(seed=5)
    teacher = Teacher(model, chat_tokenizer(), chat=ChatFormat(system_prompt="w11"))
    panel = TeacherPanel([teacher], PromptTemplates([QUESTION, "{{ source }}"]))
    rows = [{"prompt": talk(text), "source": text} for text in ("w3 w4", "w5", "w6 w7 w8")]
    labels = [(line["template"], line["pseudo_label"]) for line in pseudo_labels(panel, rows, max_completion_length=6)]
    model.save_pretrained(tmp_path)
    plain, tokenizer = load_model(str(tmp_path)), chat_tokenizer()
    expected = []
    for name, words in (("template_1", "w9 {} w10"), ("template_2", "{}")):
        for row in rows:
            inputs = tokenizer.apply_chat_template(
                talk(words.format(row["source"]), "w11"), add_generation_prompt=True, return_tensors="pt"
            )
            never = [[i] for i in (0, 2, 23, 24, 25, 27, 28, 29, 30, 31)]
            ids = plain.generate(**inputs, max_new_tokens=6, eos_token_id=[1, 26], bad_words_ids=never)
            text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            expected.append((name, text))
    assert labels == expected


def test_a_run_is_not_continued_in_another_chat(tmp_path):
    settings = {"family": "llama", "save_strategy": "steps", "save_steps": 1, "tokenizer": chat_tokenizer()}
    first = build("rloo-token", tmp_path, reward=reward(chat_tokenizer()), **settings)
    first.train()
    record = json.loads((tmp_path / "checkpoint-1" / "run.json").read_text())
    assert record["student"]["chat"]["system_prompt"] is None
    other = build(
        "rloo-token", tmp_path, reward=reward(chat_tokenizer()), chat=ChatFormat(system_prompt="w9"), **settings
    )
    with pytest.raises(InputError, match="system_prompt was null and is"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
