"""A learning rate or an epsilon at the end of its range gives a sound run in bfloat16, or none."""

import pytest

from tests.resuming.runs import make_inputs
from tests.settings.extremes import sweep

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("recipe", ["ppo_kd", "sft", "encoder_kd (task)"])
def test_the_ends_of_ranges(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for inputs in ("compare", "encoder"):
        make_inputs(inputs, tmp_path)
    result = sweep(recipe, "--bf16 True", ("learning_rate", "adam_epsilon", "neftune_noise_alpha"))
    assert result["found"] == {} and result["sound"] == 4 and result["refused"] == 2
