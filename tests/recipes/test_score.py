"""`score` against a loop in float64."""

import math

import pytest
import torch

from tests.recipes.command_lines import run
from tests.rewards.reference import log_probability
from tests.students.plain_forward import plain_forward
from tests.tiny_models import EOS, MODELS, word_tokenizer


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    directory = tmp_path_factory.mktemp("score") / "teacher"
    MODELS["t5-untied"](seed=5).save_pretrained(directory)
    word_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("cut_off", [True, False])
def test_each_token_with_its_reward(teacher, cut_off, capsys):
    command = f"score --teacher {teacher} --template 'w9 {{{{ source }}}}' --prompt 'w4 w5' --completion 'w7 w12'"
    assert run(command + " --cut_off" * cut_off) == 0
    ids = [7, 12] if cut_off else [7, 12, EOS]
    with torch.no_grad():
        logits = plain_forward(MODELS["t5-untied"](seed=5), word_tokenizer()("w9 w4 w5")["input_ids"], ids)[0]
    z_TV = [[float(z) for z in row] for row in logits.double()]
    q = [z[token] - math.fsum(z) / len(z) for z, token in zip(z_TV, ids, strict=False)]
    value = [max(z) - math.fsum(z) / len(z) for z in z_TV]
    value[len(ids)] *= cut_off
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    first = lines.index(["token", "reward", "q", "V", "log", "p"]) + 2
    for t, token in enumerate(ids):
        expected = [q[t] - value[t + 1], q[t], value[t], log_probability(z_TV[t], token)]
        assert lines[first + t][0] == {7: "w7", 12: "w12", EOS: "</s>"}[token]
        assert [float(number) for number in lines[first + t][1:]] == pytest.approx(expected, abs=2e-4)
    total = math.fsum(q[t] - value[t + 1] for t in range(len(ids)))
    assert lines[first + len(ids)][0] == "sum" and float(lines[first + len(ids)][1]) == pytest.approx(total, abs=3e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--completion w3", "--prompt is needed here."),
        ("--prompt w3", "--completion is needed here."),
        ("--prompt w3 --completion w4 --reward log_ratio", "--reward log_ratio compares with a student"),
    ],
)
def test_what_is_missing_is_named(teacher, flags, message, capsys):
    assert run(f"score --teacher {teacher} {flags}") == 2
    assert message in capsys.readouterr().err
