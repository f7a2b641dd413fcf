"""recipes/benchmarks/startup.py: shares by hand, and what a command's start is found to be."""

import pytest

from tests.recipes.command_lines import main_of

startup = main_of("benchmarks/startup").__globals__


def test_shares_are_of_modules_own_times():
    lines = [
        "import time: self [us] | cumulative | imported package",
        "import time:       600 |       900 | torch",
        "import time:       100 |       100 |   torch.nn",
        "import time:       200 |       300 | json.decoder",
        "import time:        90 |        90 | yaml",
        "import time:        10 |        10 | six",  # 1 %: too small for a line of its own
    ]
    found = startup["shares_by_package"](lines)
    assert found == pytest.approx({"torch": 0.7, "the standard library": 0.2, "yaml": 0.09, "others": 0.01})


def test_the_start_of_a_command():
    line, seconds, imports = startup["until_first_line"](["ppo_kd", "--help"], "-X", "importtime")
    assert line == "usage: ppo_kd.py [flags]" and 0.05 < seconds < 5
    modules = {line.rpartition("|")[2].strip() for line in imports}
    assert "rlkd_trl.errors" in modules and not {"torch", "transformers"} & modules
