import base64
import hashlib
import json
import math
import re

import lxml.html
import numpy as np
import pytest
import torch
import yaml

from rlkd_trl.errors import InputError
from rlkd_trl.evaluation.report import AUTO_CLASSES, comparison_table, write_metrics, write_model_card, write_report
from rlkd_trl.evaluation.run_log import RunLog
from rlkd_trl.models.chat import PromptWriter
from rlkd_trl.models.generation_config import set_trained_generation_config
from rlkd_trl.models.prompts import prompt_token_ids
from rlkd_trl.prompts import ChatFormat
from tests.tiny_models import CHAT_TEMPLATE, MODELS, chat_tokenizer, word_tokenizer

RESULTS = {
    "student before": {"bleu": 12.3456, "rougeL": 30.0, "reward": -1.5, "loss_of_my_own": 0.25},
    "teacher": {"bleu": 45.0, "teacher_nll_per_token": 0.71234, "reward": math.nan},
}


ATTACK = """</pre></title></script><script>alert("1")</script><img src='x' onerror=alert(1)>&amp;<!--"""


class Page:
    """A page as a browser reads it."""

    def __init__(self, text: str):
        self._root = lxml.html.document_fromstring(text)

    def texts(self, path: str) -> list[str]:
        return [element.text_content() for element in self._root.xpath(path)]


def report(directory, **changes) -> Page:
    """Write a report and return it parsed."""
    columns = [("bleu", "BLEU", ".2f"), ("reward", "mean reward", ".4f")]
    log = RunLog(**({"title": "A run", "results": RESULTS, "headline": columns} | changes))
    write_report(directory / "report.html", {"run": log})
    return Page((directory / "report.html").read_text(encoding="utf-8"))


def front_matter(card):
    """The YAML between the two --- lines, and the Markdown after it."""
    empty, metadata, body = card.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(metadata), body


# --- metrics.json


def test_metrics_keep_full_precision_and_order(tmp_path):
    metrics = {"z": {"bleu": 1 / 3, "n": 7, "ok": True, "name": "größe", "none": None}, "a": [0.1, 2]}
    write_metrics(tmp_path / "new" / "metrics.json", metrics)
    text = (tmp_path / "new" / "metrics.json").read_text(encoding="utf-8")
    assert json.loads(text) == metrics
    assert list(json.loads(text)) == ["z", "a"]
    assert '\n  "z": {\n    "bleu": 0.3333333333333333,' in text
    assert "größe" in text


def test_nan_and_infinity_become_null(tmp_path):
    path = tmp_path / "metrics.json"
    write_metrics(path, {"a": math.nan, "b": {"c": [1.0, math.inf, -math.inf]}, "d": np.float32("nan")})
    assert json.loads(path.read_text()) == {"a": None, "b": {"c": [1.0, None, None]}, "d": None}


def test_numpy_numbers_are_numbers(tmp_path):
    path = tmp_path / "metrics.json"
    write_metrics(path, {"a": np.float32(0.5), "b": np.int64(3), "c": np.float64(0.25)})
    assert json.loads(path.read_text()) == {"a": 0.5, "b": 3, "c": 0.25}


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    write_metrics(path, {"a": 1})
    with pytest.raises(TypeError):
        write_metrics(path, {"a": object()})

    def full_disk(*_):
        raise OSError("disk full")

    monkeypatch.setattr("rlkd_trl.evaluation.files.os.replace", full_disk)
    with pytest.raises(OSError, match="disk full"):
        write_metrics(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]


# --- the table


def test_the_table_is_aligned_and_shows_what_is_missing():
    columns = [("bleu", "BLEU", ".2f"), ("reward", "mean reward", ".1f"), ("nowhere", "other", ".1f")]
    assert comparison_table(RESULTS, columns).splitlines() == [
        "model            BLEU  mean reward  other",
        "--------------  -----  -----------  -----",
        "student before  12.35         -1.5      –",
        "teacher         45.00            –      –",
    ]


def test_the_default_columns():
    heading, _, before, teacher = comparison_table(RESULTS).splitlines()
    position = -1
    for name in ("BLEU", "ROUGE-L", "teacher NLL/token", "mean reward", "length", "distinct-2"):
        assert heading.index(name) > position
        position = heading.index(name)
    assert before.split() == ["student", "before", "12.35", "30.00", "–", "-1.5000", "–", "–"]
    assert teacher.split() == ["teacher", "45.00", "–", "0.7123", "–", "–", "–"]


def test_a_table_of_nothing_has_its_headings():
    assert comparison_table({}, [("bleu", "BLEU", ".2f")]).splitlines() == ["model  BLEU", "-----  ----"]


# --- report.html


def test_the_report_shows_results_samples_and_configuration(tmp_path):
    samples = [{"source": "a\nb", "completion": "Größe ✓ مرحبا", "reward": 0.123456}, {"source": "c", "extra": None}]
    page = report(tmp_path, samples=samples, config={"lr": 1e-5, "path": tmp_path, "x": math.nan})
    assert page.texts("//h1") == ["A run"]
    assert page.texts("//table[@class='results']/thead//th") == ["metric", "student before", "teacher"]
    names = ["BLEU", "mean reward", "rougeL", "loss_of_my_own", "teacher_nll_per_token"]
    assert page.texts("//table[@class='results']/tbody//th") == names
    cells = ["12.35", "45.00", "-1.5000", "–", "30", "–", "0.25", "–", "–", "0.7123"]
    assert page.texts("//table[@class='results']//td") == cells
    assert page.texts("//table[@class='samples']/thead//th") == ["source", "completion", "reward", "extra"]
    assert page.texts("//table[@class='samples']//td") == ["a\nb", "Größe ✓ مرحبا", "0.1235", "–", "c", "–", "–", "–"]
    assert json.loads(page.texts("//pre")[0]) == {"lr": 1e-5, "path": str(tmp_path), "x": None}


def test_everything_is_escaped(tmp_path):
    history = [{"step": step, ATTACK: step, f"{ATTACK} is always": 2.0} for step in (1, 2, 3)]
    everywhere = {"title": ATTACK, "results": {ATTACK: {ATTACK: 1.0}}, "history": history, "config": {ATTACK: ATTACK}}
    page = report(tmp_path, **everywhere, samples=[{ATTACK: ATTACK}])
    assert len(page.texts("//script")) == 2 and not page.texts("//img")
    for place in ("//title", "//h1", "//table[@class='samples']//td", "//table[@class='results']//th", "//strong"):
        assert ATTACK in page.texts(place)


def test_the_report_needs_no_network_and_runs_no_script_but_its_own(tmp_path):
    history = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]
    page = report(tmp_path, history=history)
    text = (tmp_path / "report.html").read_text()
    for forbidden in ("<link", "src=", "url(", "@import", "innerHTML", "eval("):
        assert forbidden not in text
    assert set(re.findall(r"https?://[^\"\s]*", text)) == {"http://www.w3.org/2000/svg"}  # the name of a format
    script = hashlib.sha256(page.texts("//script")[1].encode()).digest()
    assert f"script-src 'sha256-{base64.b64encode(script).decode()}'" in text


def test_control_characters_and_lone_surrogates_can_be_written(tmp_path):
    page = report(tmp_path, samples=[{"completion": "a\x00b\x1bc\ud800d\te"}])
    assert page.texts("//table[@class='samples']//td") == ["a\ufffdb\ufffdc\\ud800d\te"]


def test_a_report_of_nothing(tmp_path):
    page = report(tmp_path, results={})
    assert page.texts("//p[@class='note']") == [
        "Nothing was evaluated.",
        "Nothing was logged.",
        "No samples were given.",
    ]


def test_ten_thousand_completions_are_kept_and_of_more_all_that_are_held_out(tmp_path):
    record = {
        "step": 1,
        "kind": "rollout",
        "by": "student",
        "prompt": "p",
        "text": "t",
        "tokens": ["t"],
        "ended": True,
    }
    many = [{**record, "step": i} for i in range(12_000)] + [{**record, "step": 0, "kind": "held-out"}] * 10
    page = report(tmp_path, completions=many[:10_000])
    assert len(json.loads(page.texts("//script")[0])["completions"]) == 10_000
    page = report(tmp_path, completions=many)
    kept = json.loads(page.texts("//script")[0])["completions"]
    assert len(kept) == 10_000 and sum(one["kind"] == "held-out" for one in kept) == 10
    steps = [one["step"] for one in kept if one["kind"] == "rollout"]
    assert steps[:2] == [0, 1] and max(steps) > 11_990 and steps == sorted(steps)
    assert "Of 12010 texts, 10000 evenly spaced ones are here." in (tmp_path / "report.html").read_text()


# --- the model card


def model_card(path, **changes):
    arguments = {
        "title": "T5-base, distilled",
        "results": RESULTS,
        "method": "PPO on the teacher-forcing reward",
        "teacher": "bigscience/T0_3B",
        "student": "google-t5/t5-base",
        "dataset": "owner/texts",
    }
    write_model_card(path, **(arguments | changes))
    return front_matter(path.read_text(encoding="utf-8"))


def test_the_model_card(tmp_path):
    metadata, body = model_card(tmp_path / "README.md")
    assert metadata["library_name"] == "transformers"
    assert metadata["base_model"] == "google-t5/t5-base"
    assert metadata["datasets"] == ["owner/texts"]
    assert {"rlkd_trl", "knowledge-distillation"} <= set(metadata["tags"])
    assert "license" not in metadata
    assert "\n# T5-base, distilled\n" in body
    assert "`bigscience/T0_3B`" in body
    assert "| teacher | 45.00 | – | 0.7123 | – | – | – |\n" in body
    assert "AutoModelForSeq2SeqLM.from_pretrained(" in body


def test_the_model_card_of_a_decoder_only_student(tmp_path):
    _, body = model_card(tmp_path / "README.md", auto_class="AutoModelForCausalLM")
    assert "AutoModelForCausalLM.from_pretrained(" in body
    assert "Seq2Seq" not in body
    with pytest.raises(InputError, match="AutoModelForVision"):
        model_card(tmp_path / "README.md", auto_class="AutoModelForVision")


@pytest.mark.parametrize("name", ["t5-base", "./out/student", "/data/student", "a/b/c", "x: y", "a/b\nlicense: mit"])
def test_only_hub_ids_are_stated_as_metadata(tmp_path, name):
    metadata, _ = model_card(tmp_path / "README.md", student=name, dataset=name)
    assert set(metadata) == {"library_name", "tags"}


def test_a_local_folder_that_looks_like_a_hub_id_is_not_one(tmp_path, monkeypatch):
    (tmp_path / "out" / "student").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    metadata, _ = model_card(tmp_path / "README.md", student="out/student")
    assert "base_model" not in metadata


def test_text_cannot_leave_its_place_in_the_model_card(tmp_path):
    metadata, body = model_card(
        tmp_path / "README.md",
        title="Größe\n---\nlicense: mit",
        results={"a|b\n# c <b>": {"bleu": 1.0}},
        teacher="x`y",
    )
    assert "license" not in metadata
    assert "# Größe --- license: mit\n" in body
    assert "| a\\|b # c &lt;b&gt; | 1.00 |" in body
    assert "`` x`y ``" in body


def test_the_cards_code_speaks_as_in_training(tmp_path, capsys):
    """In the chat template, with the system prompt and the template's variables, whatever they hold."""
    model, tokenizer = MODELS["llama"](seed=3), chat_tokenizer(CHAT_TEMPLATE + "{{ more }}")
    system = "w3 ``` w4\n``` \\"
    chat = ChatFormat(system_prompt=system, template_kwargs={"more": "w5 `w6"})
    writer = PromptWriter(tokenizer, chat)
    set_trained_generation_config(model, writer.processing_class, max_completion_length=5)
    model.save_pretrained(tmp_path)
    writer.processing_class.save_pretrained(tmp_path)
    _, body = model_card(tmp_path / "README.md", auto_class="AutoModelForCausalLM", chat=chat)
    assert body.count("```") == 2
    code = body.split("```python\n")[1].split("```")[0]
    seen = []
    code = code.replace("path/or/hub-id/of/this-model", str(tmp_path)).replace("the source text", "w5 w9")
    exec(
        code.replace("model.generate(**inputs)", "(seen.append(inputs), model.generate(**inputs))[1]"), {"seen": seen}
    )
    expected = prompt_token_ids(writer.processing_class, [writer.text("w5 w9")])
    assert seen[0]["input_ids"].tolist() == expected
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(("name", "auto_class"), [("t5-untied", AUTO_CLASSES[0]), ("llama", AUTO_CLASSES[1])])
@pytest.mark.parametrize("has_content_tokens", [True, False])
def test_the_cards_code_writes_what_the_model_answers(name, auto_class, has_content_tokens, tmp_path, capsys):
    """The words of `generate`'s tokens, of a decoder-only model those after the prompt."""
    model, tokenizer = MODELS[name](seed=3), word_tokenizer()
    set_trained_generation_config(model, tokenizer, max_completion_length=5)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    write_model_card(
        tmp_path / "README.md",
        title="t",
        results=RESULTS,
        method="m",
        teacher="t",
        student="s",
        dataset="d",
        auto_class=auto_class,
        has_content_tokens=has_content_tokens,
    )
    code = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("path/or/hub-id/of/this-model", str(tmp_path)).replace("the source text", "w5 w9")
    capsys.readouterr()
    exec(code, {})
    ids = model.generate(input_ids=torch.tensor([[5, 9, 1]]))[0].tolist()
    new = ids[1:] if "T5" in type(model).__name__ else ids[3:]
    words = [f"w{token}" for token in new if token > 2]
    special = [] if not has_content_tokens else ["<pad>"] * ("T5" in type(model).__name__) + ["</s>"] * (1 in new)
    assert sorted(capsys.readouterr().out.split()) == sorted(words + special)
    assert 1 <= len(words) <= 5
