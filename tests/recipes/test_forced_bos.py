"""BART and mBART by the real commands: a forced BOS is given everywhere, and markers are content."""

import pytest

from tests.models.bart_like import LANGUAGE, bart_like, checkpoint_texts, tokenizer
from tests.recipes.command_lines import COLUMNS, TWO_STEPS, read_jsonl, run, write_csv
from tests.tiny_models import EOS

pytestmark = pytest.mark.slow
LEARN = "--max_steps 150 --learning_rate 1e-2 --disable_tqdm True"
TEMPLATE = "--template 'w26 {{ mr }} w25'"


@pytest.mark.parametrize(("name", "start", "forced"), [("Bart", EOS, LANGUAGE), ("MBart", LANGUAGE, None)])
def test_what_plain_generate_says_is_labelled_and_evaluated(name, start, forced, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bart_like(name, start=start, forced=forced).save_pretrained("new")
    tokenizer().save_pretrained("new")
    rows = [{"mr": f"w{3 + i}", "ref": f"<triplet> w{4 + i} <subj> w{20 - i}"} for i in range(10)]
    sources = [row["mr"] for row in rows]
    write_csv(tmp_path / "pairs.csv", rows)
    write_csv(tmp_path / "sources.csv", [{"mr": source} for source in sources])  # no target shows the markers
    data, lengths = "--dataset sources.csv --source_column mr", "--max_completion_length 7"
    assert run(f"sft --student new --dataset pairs.csv {COLUMNS} {TEMPLATE} {LEARN} --output_dir teacher") == 0
    answers = checkpoint_texts("teacher", [f"w26 {source} w25" for source in sources])
    assert all(text.startswith("<triplet> w") and "<subj>" in text for text in answers), "it has not learnt enough"
    assert len(set(answers)) > 2, "it does not tell its prompts apart"
    assert run(f"pseudo_label --teacher teacher {data} {TEMPLATE} {lengths} --output labels.jsonl") == 0
    assert [line["pseudo_label"] for line in read_jsonl(tmp_path / "labels.jsonl")] == answers

    labels = "--dataset labels.jsonl --source_column mr --target_column pseudo_label"
    assert run(f"sft --student new {labels} {LEARN} --output_dir warm") == 0
    models = f"--teacher teacher {TEMPLATE} {data} {lengths}"
    sampling = f"--num_generations 2 {TWO_STEPS} --per_device_train_batch_size 4"
    assert run(f"ppo_kd {models} --student warm {sampling} --output_dir ppo") == 0
    for student in ("warm", "ppo"):
        assert run(f"evaluate {models} --student {student} --output_dir of_{student}") == 0
        outputs = read_jsonl(tmp_path / f"of_{student}" / "outputs.jsonl")
        assert [line["teacher"] for line in outputs] == answers
        assert [line["student"] for line in outputs] == checkpoint_texts(student, sources)
        assert "<triplet>" in outputs[0]["student"]
