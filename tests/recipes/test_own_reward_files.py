"""`--reward path/to/file.py:name`, in commands as a user runs them."""

import pytest

from tests.recipes.command_lines import COLUMNS, ROOT, SAMPLING, TWO_STEPS, metrics_of, run

MARGIN = ROOT / "recipes" / "rewards" / "margin.py"


@pytest.mark.slow(0.7)
@pytest.mark.parametrize("recipe", ["rloo_kd", "ppo_kd"])
def test_the_shipped_example(recipe, checkpoints, train_csv, tmp_path):
    """The class is the function with a floor that these teachers do not reach; a student's greedy margins are ≤ 0."""
    pair, rewards = checkpoints["t5-untied"], []
    for name in ("margin", "MarginReward"):
        flags = (
            f"--teacher {pair.teacher} --student {pair.student} --dataset {train_csv} {COLUMNS} {TWO_STEPS} {SAMPLING}"
        )
        assert run(f"{recipe} {flags} --reward {MARGIN}:{name} --output_dir {tmp_path / name}") == 0
        metrics = metrics_of(tmp_path / name)
        assert metrics["before"]["reward"] < -0.1
        assert metrics["after"]["reward"] != metrics["before"]["reward"]
        assert metrics["teacher"]["reward"] > metrics["before"]["reward"], "its own greedy text has the larger margins"
        rewards.append([metrics[row]["reward"] for row in ("before", "after", "teacher")])
    assert rewards[0] == pytest.approx(rewards[1], rel=1e-6)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sys.exit(0)", "raised SystemExit: 0 (line 4 of"),
        pytest.param(
            "return completions[0]['w3']",
            "raised TypeError: string indices must be integers",
            marks=pytest.mark.slow(0.3),
        ),
        ("return None", "returned None; it must return one number per completion"),
        pytest.param(
            "return 'good'", "returned 'good'; it must return one number per completion", marks=pytest.mark.slow(0.3)
        ),
        pytest.param(
            "return 1.0", "returned 1.0; it must return one number per completion", marks=pytest.mark.slow(0.3)
        ),
    ],
)
def test_a_reward_that_fails_ends_in_one_line(body, message, checkpoints, train_csv, tmp_path, capsys):
    pair, file = checkpoints["t5-tied"], tmp_path / "mine.py"
    file.write_text(f"import sys\n\ndef mine(completions):\n    {body}\n")
    flags = f"--teacher {pair.teacher} --student {pair.student} --dataset {train_csv} {COLUMNS} {TWO_STEPS} {SAMPLING}"
    assert run(f"rloo_kd {flags} --reward {file}:mine --output_dir {tmp_path / 'out'}") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and str(file) in errors[0]
    if "raised" in message:
        assert "on the prompt 'w" in errors[0]


def test_a_function_without_arguments_is_refused_before_anything_is_loaded(train_csv, tmp_path, capsys, checkpoints):
    pair = checkpoints["t5-tied"]
    file = tmp_path / "mine.py"
    file.write_text("def mine():\n    return 1.0\n")
    assert run(f"rloo_kd --teacher {pair.teacher} --reward {file}:mine --output_dir {tmp_path / 'out'} "
               f"--student {pair.student} --dataset {train_csv} {COLUMNS}") == 2  # fmt: skip
    assert "The reward 'mine' takes (): a reward takes one argument" in capsys.readouterr().err
