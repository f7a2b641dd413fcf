"""The directory in which commands with something wrong in them run: data, templates, presets, rewards, checkpoints."""

import gzip
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5ForConditionalGeneration,
    ViTConfig,
)

from tests.recipes.command_lines import word_rows, write_csv, write_templates
from tests.tiny_models import VOCAB, tiny_llama, word_tokenizer

ROWS = word_rows(30)
# Nine aliases of nine aliases …: 9 ** 9 values.
_YAML_BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
_DEEP = "[\n" * 5000 + "]" * 5000  # a bracket a line: in one line PyYAML looks for a key behind each, for seconds


class _Touches:
    """Unpickling it makes a file `unpickled` in the current directory."""

    def __reduce__(self):
        return Path.touch, (Path("unpickled"),)


def make_files(here: Path, teacher: Path, student: Path) -> None:
    """Writes all of them; `teacher` and `student` are sound checkpoints of one family."""
    shutil.copytree(teacher, here / "teacher")
    shutil.copytree(student, here / "student")
    (here / "files").mkdir()
    _make_data(here)
    _make_templates(here)
    _make_presets(here)
    _make_rewards(here)
    _make_checkpoints(here)
    _make_runs(here)


def _write(here: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (here / name).parent.mkdir(exist_ok=True, parents=True)
        (here / name).write_text(text, encoding="utf-8")


def _lines(rows: list[object]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# Data


def _make_data(here: Path) -> None:
    write_csv(here / "data.csv", ROWS)
    write_csv(here / "test.csv", word_rows(8, seed=1))
    write_csv(here / "no_source.csv", [*ROWS[:2], {"mr": "", "ref": "w3"}, *ROWS[2:]])
    write_csv(here / "no_target.csv", [*ROWS[:2], {"mr": "w3", "ref": ""}, *ROWS[2:]])
    write_csv(here / "numbers.csv", [{"mr": row["mr"], "ref": str(i)} for i, row in enumerate(ROWS)])
    write_csv(here / "with_prompt.csv", [{**row, "prompt": "w3"} for row in ROWS])
    good = (here / "data.csv").read_text()
    (here / "latin1.csv").write_bytes(good.encode() + "w3 ä,w4\n".encode("latin1"))
    (here / "latin1.jsonl").write_bytes(_lines(ROWS).encode() + '{"mr": "ä", "ref": "w3"}\n'.encode("latin1"))
    (here / "utf16.csv").write_bytes(good.encode("utf-16"))
    (here / "gzip.csv").write_bytes(gzip.compress(good.encode()))
    (here / "pickle.csv").write_bytes(pickle.dumps(_Touches()))
    (here / "data.pkl").write_bytes(pickle.dumps(_Touches()))
    (here / "torch.pt").write_bytes(pickle.dumps(_Touches()))
    (here / "text.parquet").write_text("mr,ref\nw3,w4\n")
    with zipfile.ZipFile(here / "zip.csv", "w") as archive:
        archive.writestr("data.csv", good)
    with zipfile.ZipFile(here / "data.zip", "w") as archive:
        archive.writestr("data.csv", good)
    Dataset.from_list(ROWS).save_to_disk(here / "saved")
    shutil.copytree(here / "saved", here / "saved_torn")
    next((here / "saved_torn").glob("*.arrow")).write_bytes(b"ARROW")
    for name in ("links_out", "with_pickle", "two_splits", "leads_out", "no_data"):
        (here / name).mkdir()
    (here / "links_out" / "train.csv").symlink_to(here / "data.csv")
    (here / "with_pickle" / "train.pkl").write_bytes(pickle.dumps(_Touches()))
    for split in ("train", "validation"):
        write_csv(here / "two_splits" / f"{split}.csv", ROWS)
    leads_out = "---\nconfigs:\n- config_name: default\n  data_files: {}\n---\n"
    _write(
        here,
        {
            "empty.csv": "",
            "header.csv": "mr,ref\n",
            "data.txt": "w3\n",
            "ragged.csv": "mr,ref\n" + "w3 w4,w5,w6\n" * 30,
            "unclosed.csv": 'mr,ref\n"w3 w4,w5\n' + "w3,w4\n" * 3,
            "semicolons.csv": good.replace(",", ";"),
            "twice.csv": good.replace("mr,ref", "mr,mr", 1),
            "null_words.csv": good + "NA,w3\n",
            "empty_targets.jsonl": _lines([{"mr": "w3", "ref": ""}, {"mr": "w4", "ref": ""}]),
            "broken.jsonl": '{"mr": "w3", "ref"\n',
            "broken_line.jsonl": _lines(ROWS[:2]) + '{"mr": "w3", "ref": \n' + _lines(ROWS[2:]),
            "empty.jsonl": "\n\n",
            "empty.json": "[]",
            "not_json.json": "mr: w3",
            "number.json": "7",
            "lists.jsonl": _lines([["w3", "w4"]] * 3),
            "key_twice.jsonl": '{"mr": "w3", "mr": "w4", "ref": "w5"}\n',
            "null_source.jsonl": _lines([*ROWS[:2], {"mr": None, "ref": "w3"}]),
            "null_target.jsonl": _lines([*ROWS[:2], {"mr": "w3", "ref": None}]),
            "nested.jsonl": _lines([{"mr": {"name": row["mr"]}, "ref": row["ref"]} for row in ROWS]),
            "list_source.jsonl": _lines([{"mr": [row["mr"]], "ref": row["ref"]} for row in ROWS]),
            "no_references.jsonl": _lines([*({**row, "ref": [row["ref"]]} for row in ROWS), {"mr": "w3", "ref": []}]),
            "null_reference.jsonl": _lines([{**row, "ref": [row["ref"], None]} for row in ROWS]),
            "mixed.jsonl": _lines([*ROWS, {"mr": 3, "ref": "w3"}]),
            "talks.jsonl": _lines([{**row, "mr": _said(row["mr"])} for row in ROWS]),
            "bad_talks.jsonl": _lines(
                [{"mr": _said("w3"), "ref": "w4"}, {"mr": [{"role": None, "content": "w4"}], "ref": "w5"}]
            ),
            "images.jsonl": _lines([{"mr": [{"role": "user", "content": [{"type": "text"}]}], "ref": "w3"}] * 9),
            "two_turns.jsonl": _lines([{"mr": "w3", "ref": [{"role": "assistant", "content": "w3"}, *_said("w4")]}]),
            "only_header/train.csv": "mr,ref\n",
            "leads_out/README.md": leads_out.format("../data.csv"),
            "leads_far/README.md": leads_out.format(here / "data.csv"),
            "leads_to_the_net/README.md": leads_out.format("https://example.org/data.csv"),
            "bad_card/README.md": "---\nconfigs: [\n---\n",
        },
    )


# Templates


def _make_templates(here: Path) -> None:
    write_templates(here / "good.yaml", one="w9 {{ mr }}")
    write_templates(here / "not_jinja.yaml", one="w9 {{ mr")
    write_templates(here / "fails.yaml", one="{{ 1 / 0 }} {{ mr }}")
    write_templates(here / "two_columns.yaml", one="{{ mr }} {{ kind }}")
    write_templates(here / "shows_reference.yaml", one="{{ mr }} {{ ref }}")
    write_templates(here / "blank.yaml", one="{% if mr == 'w3' %}{{ mr }}{% endif %}")
    write_templates(here / "evil.yaml", one="{{ mr.__class__ }}")
    write_templates(here / "bomb.yaml", one="{{ mr }}{{ 'a' * 10**10 }}")
    write_templates(here / "includes.yaml", one="{% include 'data.csv' %}{{ mr }}")
    twice = write_templates(here / "same_name.yaml", one="{{ mr }}", two="w9 {{ mr }}")
    twice.write_text(twice.read_text().replace("name: two", "name: one"))
    (here / "latin1.yaml").write_bytes("ask: 'ä {{ mr }}'".encode("latin1"))
    _write(
        here,
        {
            "empty.yaml": "",
            "not_chat.jinja": "{% for m in messages %}",
            "silent.jinja": "w3 w4",
            "no_system.jinja": "{% for m in messages %}{% if m.role == 'system' %}"
            "{{ raise_exception('no system here') }}{% endif %}{{ m.content }} {% endfor %}",
            "bomb.jinja": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "no_templates.yaml": "dataset: mine\ntemplates: []\n",
            "number_for_text.yaml": "ask: 7\n",
            "deep_template.yaml": f"ask: {_DEEP}",
            "code.yaml": "ask: !!python/object/apply:os.system ['touch unpickled']\n",
            "key_twice.yaml": "ask: 'w3 {{ mr }}'\nask: 'w4 {{ mr }}'\n",
        },
    )


def _make_presets(here: Path) -> None:
    _write(here, {"ppo_kd/reward_fails.yaml": "reward: [fails.py:f]\n", "token.yaml": "hub_token: abc\n"})
    for recipe in ("ppo_kd", "rloo_kd", "reinforce_kd", "kd", "all_actions_kd"):
        _write(here, {f"{recipe}/plain.yaml": "per_device_train_batch_size: 8\nnum_generations: 2\n"})
    (here / "latin1_preset.yaml").write_bytes("source_column: 'ä'".encode("latin1"))
    _write(
        here,
        {
            "misspelt_key.yaml": "sorce_column: mr\n",
            "not_yaml.yaml": "a: [\n",
            "list.yaml": "- max_rows\n",
            "word_for_number.yaml": "max_rows: many\n",
            "list_for_number.yaml": "max_rows: [1, 2]\n",
            "mapping_for_number.yaml": "max_rows: {a: 1}\n",
            "yes_for_number.yaml": "max_rows: yes\n",
            "nan_for_number.yaml": "max_rows: .nan\n",
            "null_for_list.yaml": "reward: null\n",
            "unknown_choice.yaml": "save_strategy: sometimes\n",
            "twice_in_preset.yaml": "max_rows: 3\nsource_column: mr\nmax_rows: 4\n",
            "date.yaml": "max_rows: 2026-13-45\n",
            "deep.yaml": f"max_rows: {_DEEP}",
            "yaml_bomb.yaml": _YAML_BOMB,
            "cycle.yaml": "max_rows: &a [*a]\n",
            "python.yaml": "max_rows: !!python/object/apply:os.system ['touch unpickled']\n",
            "two_documents.yaml": "max_rows: 1\n---\nmax_rows: 2\n",
            "number_as_key.yaml": "1: 2\n",
            "another_preset.yaml": "config: list.yaml\n",
            "weight_decay_nan.yaml": "weight_decay: .nan\n",
            "weights_as_text.yaml": "reward_weights: [a]\n",
        },
    )


def _make_rewards(here: Path) -> None:
    body = {
        "none": "return None",
        "scalar": "return 1.0",
        "text": "return 'good'",
        "short": "return [1.0]",
        "words": "return ['good'] * len(completions)",
        "nan": "return [float('nan')] * len(completions)",
        "infinite": "return [float('inf')] * len(completions)",
        "huge": "return [1e39] * len(completions)",
        "raising": "raise KeyError('mine')",
        "exits": "sys.exit(0)",
        "mapping": "return dict(enumerate(completions))",
        "input_error": "raise RuntimeError('first line\\nsecond line')",
    }
    functions = "".join(f"def {name}(completions):\n    {line}\n\n\n" for name, line in body.items())
    _write(
        here,
        {
            "rewards.py": "def f(completions):\n    return [0.0 for _ in completions]\n",
            "bad_rewards.py": f"import sys\n\n\n{functions}"
            "def no_arguments():\n    return 1.0\n\n\ndef two(a, b):\n    return 1.0\n\n\n"
            "def wants_more(completions, kindness):\n    return [0.0 for _ in completions]\n\n\n"
            "def of_inputs(inputs):\n    return inputs.completion_ids_BT[:, :1, None]\n\n\n"
            "class NoReward:\n    pass\n\n\nnumber = 7\n",
            "fails.py": 'raise ValueError("first line\\nsecond line")\n',
            "syntax.py": "def f(completions:\n",
            "imports.py": "import a_module_that_is_not_there\n",
            "exits.py": "import sys\n\nsys.exit(0)\n",
        },
    )
    (here / "latin1.py").write_bytes("# ä\ndef f(completions):\n    return []\n".encode("latin1"))


# Checkpoints


def _make_checkpoints(here: Path) -> None:
    def copy(name: str, *left_out: str) -> Path:
        return shutil.copytree(here / "teacher", here / name, ignore=shutil.ignore_patterns(*left_out))

    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["w99"])
    tokenizer.save_pretrained(copy("other_tokenizer"))
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "w5"
    tokenizer.save_pretrained(copy("other_eos"))
    tokenizer = word_tokenizer(append_eos=False)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(copy("without_eos"))
    tokenizer = word_tokenizer()
    tokenizer.add_tokens([f"new{i}" for i in range(40)])
    tokenizer.save_pretrained(copy("more_tokens"))
    copy("without_tokenizer", "tokenizer*")
    copy("without_weights", "*.safetensors")
    copy("without_config", "config.json")

    for name, text in {
        "config_is_text": "model_type: t5",
        "config_is_list": "[]",
        "config_is_empty": "",
        "config_without_type": "{}",
        "config_of_unknown_type": '{"model_type": "poem"}',
        "config_of_bytes": None,
    }.items():
        (copy(name) / "config.json").write_bytes(b"\xff\xfe\x00" if text is None else text.encode())
    _edit_config(copy("dropout_of_7"), dropout_rate=7)
    (copy("generation_is_torn") / "generation_config.json").write_text('{"eos_token_id": ')
    (copy("eos_is_text") / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    (copy("start_is_no_token") / "generation_config.json").write_text('{"decoder_start_token_id": 999}')
    (copy("tokenizer_is_text") / "tokenizer.json").write_text("w3 w4")
    remote = copy("remote_code")
    _edit_config(
        remote, model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModelForSeq2SeqLM": "mine.Model"}
    )
    (remote / "mine.py").write_text("import pathlib\n\npathlib.Path('unpickled').touch()\n")

    weights = copy("torn_weights") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (copy("no_safetensors") / "model.safetensors").write_bytes(b"\0" * 64)
    (copy("pickled_weights", "*.safetensors") / "pytorch_model.bin").write_bytes(pickle.dumps(_Touches()))
    _change_weights(copy("nan_weights"), lambda weights: weights["shared.weight"].fill_(float("nan")))
    _change_weights(copy("without_embeddings"), lambda weights: weights.pop("shared.weight"))
    _change_weights(copy("without_block"), lambda weights: [weights.pop(n) for n in list(weights) if ".block.1." in n])
    _edit_config(copy("other_shape"), d_model=24)
    sharded = copy("missing_shard", "*.safetensors")
    (sharded / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"shared.weight": "model-00001-of-00002.safetensors"}})
    )

    BertForMaskedLM(
        BertConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ).save_pretrained(here / "encoder_only")
    word_tokenizer().save_pretrained(here / "encoder_only")
    ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(here / "vision")
    word_tokenizer().save_pretrained(here / "vision")
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 1}
    GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=8, **sizes)).save_pretrained(here / "few_positions")
    word_tokenizer().save_pretrained(here / "few_positions")
    tiny_llama().save_pretrained(here / "llama")
    word_tokenizer().save_pretrained(here / "llama")
    (here / "adapter").mkdir()
    (here / "adapter" / "adapter_config.json").write_text("{}")
    _make_adapters(here, "lora", "student")
    _make_adapters(here, "lora_on_lora", "lora")
    _make_adapters(here, "lora_of_gone", "./gone")
    weights = load_file(here / "lora" / "adapter_model.safetensors")
    deeper = {name.replace("encoder.block.0", "encoder.block.7"): weight for name, weight in weights.items()}
    save_file(deeper, _make_adapters(here, "lora_of_deeper", "student") / "adapter_model.safetensors")
    weights.popitem()
    save_file(weights, _make_adapters(here, "lora_incomplete", "student") / "adapter_model.safetensors")


def _make_adapters(here: Path, name: str, model: str) -> Path:
    """LoRA's for the student, which say that they are for another model."""
    base = T5ForConditionalGeneration.from_pretrained(here / "student")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q"], task_type="SEQ_2_SEQ_LM"))
    adapted.peft_config["default"].base_model_name_or_path = model
    adapted.save_pretrained(here / name)
    word_tokenizer().save_pretrained(here / name)
    return here / name


def _edit_config(checkpoint: Path, **changed: object) -> None:
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def _change_weights(checkpoint: Path, change) -> None:
    weights: dict[str, torch.Tensor] = load_file(checkpoint / "model.safetensors")
    change(weights)
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})


# What runs have left


def _make_runs(here: Path) -> None:
    _write(
        here,
        {
            "finished/finished.json": '{"step": 2}\n',
            "finished/model.safetensors": "weights",
            "finished/outputs.jsonl": "{}\n",
            "finished/metrics.json": "{}\n",
            "begun/checkpoint-1/model.safetensors": "torn",
            "labels.jsonl": "{}\n",
            "a_file": "",
        },
    )
    (here / "link_to_teacher").symlink_to(here / "teacher")
