"""The real commands on chat models and on conversations, against plain transformers."""

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.recipes.command_lines import COLUMNS, SAMPLING, TWO_STEPS, metrics_of, read_jsonl, run, word_rows, write_csv
from tests.recipes.stand_ins import GOOD, calls, compare, results_of
from tests.tiny_models import CHAT_TEMPLATE, END, chat_tokenizer, tiny_llama
from tests.trainers.tiny_runs import assert_same_weights

CAP = "--max_completion_length 6"
SYSTEM = "w3 w3"
# What `generate` has to be told of an untrained checkpoint; a trained one says it itself.
NEVER = [[i] for i in (0, 2, 23, 24, 25, 27, 28, 29, 30, 31)]
UNTRAINED = {"max_new_tokens": 6, "bad_words_ids": NEVER, "eos_token_id": [1, 26]}


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    """A teacher, and a base model as its student: the same tokenizer, without a chat template and with another EOS."""
    here = tmp_path_factory.mktemp("chats")
    for seed, (name, tokenizer) in enumerate((("teacher", chat_tokenizer()), ("base", chat_tokenizer(None)))):
        tiny_llama(seed=seed).save_pretrained(here / name)
        tokenizer.save_pretrained(here / name)
    for name, rows in {"train": rows_of(30), "test": rows_of(6, seed=1)}.items():
        write_csv(here / f"{name}.csv", rows)
        talks = [{"prompt": talk(row["mr"]), "completion": said(row["ref"])} for row in rows]
        (here / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks))
    return here


def rows_of(count: int, seed: int = 0) -> list[dict[str, str]]:
    """`word_rows` of words that are no markers of the chat: in targets, those would be content."""
    return [
        {name: " ".join(f"w{3 + (int(word[1:]) - 3) % 20}" for word in text.split()) for name, text in row.items()}
        for row in word_rows(count, seed)
    ]


def talk(text: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation of three turns, of which the user's are the text's first word and the others."""
    first = [] if system is None else [{"role": "system", "content": system}]
    words = text.split()
    return [
        *first,
        {"role": "user", "content": words[0]},
        {"role": "assistant", "content": "w4"},
        {"role": "user", "content": " ".join(words[1:])},
    ]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def answers(checkpoint: Path, conversations: list[list[dict]], **settings) -> list[str]:
    """Plain `generate`, in the chat template of the checkpoint's tokenizer."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    texts = []
    for conversation in conversations:
        inputs = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_tensors="pt")
        output = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
        texts.append(tokenizer.decode(output, skip_special_tokens=True))
    return texts


@pytest.mark.parametrize(
    "method", ["rloo_kd", pytest.param("kd --divergence jsd --lmbda 0.5", marks=pytest.mark.slow)]
)
def test_from_conversations_to_a_student_that_plain_generate_speaks_with(method, chats, tmp_path):
    """The student is a base model: it learns the teacher's chat template, and to end its turns, and is saved so."""
    labels, warm, out = tmp_path / "labels.jsonl", tmp_path / "warm", tmp_path / "out"
    teacher = f"--teacher {chats / 'teacher'} --teacher_system_prompt '{SYSTEM}'"
    student = f"--student_chat_template {chats / 'teacher'} --student_system_prompt w5"
    on_train, on_test = (
        f"--dataset {chats / f'{name}.jsonl'} --source_column prompt --target_column completion"
        for name in ("train", "test")
    )
    assert run(f"pseudo_label {teacher} {on_train} {CAP} --output {labels}") == 0
    rows = read_jsonl(labels)
    assert [row["prompt"] for row in rows] == [talk(row["mr"]) for row in rows_of(30)]
    asked = [talk(row["mr"], SYSTEM) for row in rows_of(30)]
    assert [row["pseudo_label"] for row in rows] == answers(chats / "teacher", asked, **UNTRAINED)

    of_labels = f"--dataset {labels} --source_column prompt --target_column pseudo_label"
    assert run(f"sft --student {chats / 'base'} {student} {of_labels} {TWO_STEPS} --output_dir {warm}") == 0
    tokenizer = AutoTokenizer.from_pretrained(warm)
    assert (tokenizer.chat_template, tokenizer.eos_token) == (CHAT_TEMPLATE, END)

    system = "--student_system_prompt w5"  # the template is the checkpoint's by now
    held_out = f"--eval_dataset {chats / 'test.jsonl'}"
    flags = f"{teacher} --student {warm} {system} {on_train} {held_out} {TWO_STEPS} {SAMPLING}"
    assert run(f"{method} {flags} --output_dir {out}") == 0

    assert run(f"evaluate --student {out} {system} {teacher} {on_test} {CAP} --output_dir {tmp_path / 'test'}") == 0
    outputs = read_jsonl(tmp_path / "test" / "outputs.jsonl")
    asked = [talk(row["mr"], "w5") for row in rows_of(6, seed=1)]
    assert [row["student"] for row in outputs] == answers(out, asked)
    assert [row["references"] for row in outputs] == [[row["ref"]] for row in rows_of(6, seed=1)]
    found = metrics_of(tmp_path / "test")["student"]
    for name, value in metrics_of(out)["after"].items():
        assert found[name] == pytest.approx(value, rel=1e-4), name


def test_whole_conversations_are_prompts_and_answers(chats, tmp_path, capsys):
    """TRL's column `messages`, named as source and target, is what `prompt` and `completion` are; the card's example
    asks as the student was asked."""
    rows = [{"messages": talk(row["mr"]) + said(row["ref"])} for row in rows_of(30)]
    file = tmp_path / "talks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    student = f"--student {chats / 'base'} --student_chat_template {chats / 'teacher'} --student_system_prompt w5"
    weights = []
    for data, columns in ((file, ("messages", "messages")), (chats / "train.jsonl", ("prompt", "completion"))):
        flags = f"--dataset {data} --source_column {columns[0]} --target_column {columns[1]} {TWO_STEPS}"
        out = tmp_path / f"out{len(weights)}"
        assert run(f"sft {student} {flags} --output_dir {out}") == 0
        weights.append(load_file(out / "model.safetensors"))
        card = (out / "README.md").read_text()
        assert "tokenizer.apply_chat_template(" in card and "'content': 'w5'" in card
    assert_same_weights(*weights)
    assert "conversations end with the assistant" not in capsys.readouterr().out
    # Without a target they are conversations to go on with, which is said.
    teacher = f"--teacher {chats / 'teacher'} --dataset {file} --source_column messages {CAP}"
    assert run(f"pseudo_label {teacher} --output {tmp_path / 'labels.jsonl'}") == 0
    assert (
        "30 of 30 conversations end with the assistant, whose last words are gone on from" in capsys.readouterr().out
    )
    assert run(f"pseudo_label {teacher} --target_column messages --output {tmp_path / 'asked.jsonl'}") == 0
    found = [row["pseudo_label"] for row in read_jsonl(tmp_path / "asked.jsonl")]
    assert found == answers(chats / "teacher", [talk(row["mr"]) for row in rows_of(30)], **UNTRAINED)


def test_templates_stand_inside_of_the_chat(chats, tmp_path):
    """The source text is what the user said last."""
    output = tmp_path / "labels.jsonl"
    flags = f"--teacher {chats / 'teacher'} --dataset {chats / 'test.jsonl'} --source_column prompt {CAP}"
    assert run(f"pseudo_label {flags} --template 'w6 {{{{ source }}}} w7' --output {output}") == 0
    last = [f"w6 {' '.join(row['mr'].split()[1:])} w7" for row in rows_of(6, seed=1)]
    expected = answers(chats / "teacher", [[{"role": "user", "content": text}] for text in last], **UNTRAINED)
    assert [row["pseudo_label"] for row in read_jsonl(output)] == expected


@pytest.mark.parametrize("template", ["auto", "none"])
def test_a_chat_model_can_be_asked_without_its_chat(template, chats, tmp_path, capsys):
    output = tmp_path / "labels.jsonl"
    flags = f"--teacher {chats / 'teacher'} --teacher_chat_template {template} --dataset {chats / 'test.csv'} {CAP}"
    assert run(f"pseudo_label {flags} --source_column mr --output {output}") == 0
    assert ("asked through a chat template" in capsys.readouterr().out) == (template == "auto")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(chats / "teacher"), chat_tokenizer()
    never, expected = [*NEVER, *([[26]] if template == "none" else [])], []
    for row in rows_of(6, seed=1):
        inputs = tokenizer(f"w23 {row['mr']} w26 w24" if template == "auto" else row["mr"], return_tensors="pt")
        output_ids = model.generate(
            **inputs, max_new_tokens=6, bad_words_ids=never, eos_token_id=[1, 26] if template == "auto" else 1
        )
        expected.append(tokenizer.decode(output_ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert [row["pseudo_label"] for row in read_jsonl(output)] == expected


def test_a_cap_leaves_the_chat_whole_and_is_said(chats, tmp_path, capsys):
    """Of 16 tokens, four are the system's, eight the other markers, and four what was said, of which one goes."""
    flags = f"--teacher {chats / 'teacher'} --teacher_system_prompt '{SYSTEM}' --dataset {chats / 'test.jsonl'} {CAP}"
    flags += " --source_column prompt --teacher_max_prompt_length 15"
    output = tmp_path / "labels.jsonl"
    assert run(f"pseudo_label {flags} --output {output}") == 0
    printed = capsys.readouterr().out
    assert "6 of 6 rows' questions to the teacher are longer than --teacher_max_prompt_length 15" in printed
    cut = [talk(" ".join(row["mr"].split()[:3]), SYSTEM) for row in rows_of(6, seed=1)]
    tokenizer = chat_tokenizer()
    assert {len(tokenizer.apply_chat_template(one, add_generation_prompt=True)["input_ids"]) for one in cut} == {15}
    assert [row["pseudo_label"] for row in read_jsonl(output)] == answers(chats / "teacher", cut, **UNTRAINED)


@pytest.mark.slow
def test_a_comparison_asks_as_the_evaluation_does(workplace):
    """Its runs get the same flags, and what they leave is tested in the same chat."""
    (workplace / "own.jinja").write_text("{% for m in messages %}w3 {{ m.content }} w4 {% endfor %}")
    flags = "--teacher_chat_template own.jinja --student_chat_template own.jinja --student_system_prompt w9"
    of_ppo = f"{GOOD.replace('ppo rloo_sequence --seeds 0 1', 'ppo --seeds 0')} {flags}"
    assert compare(of_ppo, workplace) == 0
    (call,) = calls(workplace)
    assert call["values"]["--student_system_prompt"] == "w9"
    assert call["values"]["--teacher_chat_template"] == "own.jinja"
    rows = {row["model"]: row for row in results_of(workplace)["tests"]["test"]["max_steps_3"]}
    evaluated = f"evaluate --student {os.environ['TRAINED']} --teacher teacher --dataset test.csv {COLUMNS} {CAP}"
    evaluated += " --templates good.yaml"
    assert run(f"{evaluated} {flags} --output_dir chat") == 0
    assert run(f"{evaluated} --output_dir plain") == 0
    for name in ("bleu", "teacher_nll_per_token"):
        found = rows["ppo"]["greedy"][name]["mean"]
        assert found == pytest.approx(metrics_of(workplace / "chat")["student"][name], rel=1e-5)
    assert found != pytest.approx(metrics_of(workplace / "plain")["student"][name], rel=1e-3)
    # Another text in that file is another comparison.
    (workplace / "own.jinja").write_text("{% for m in messages %}w3 {{ m.content }} w5 {% endfor %}")
    assert compare(of_ppo, workplace) == 2
