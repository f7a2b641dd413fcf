"""recipes/cache_teacher.py, and recipes/kd.py without its teacher."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.forked_launchers import launched
from tests.distributed.launching import ENVIRONMENT
from tests.recipes.command_lines import COLUMNS, ROOT, metrics_of, run, write_templates

FLAGS = (
    f"{COLUMNS} --max_completion_length 6 --max_steps 4 --learning_rate 1e-2 --lr_scheduler_type constant "
    "--logging_steps 1 --disable_tqdm True --per_device_train_batch_size 8 --distillation_temperature 2"
)
OF_CACHE = f"{COLUMNS} --max_completion_length 6 --distillation_temperature 2 --batch_size 7 --rows_per_shard 9"


@pytest.fixture(scope="module")
def place(tmp_path_factory, checkpoints, train_csv):
    """A directory with a cache of all ids; the teacher in it is gone afterwards."""
    here = tmp_path_factory.mktemp("cached")
    pair = checkpoints["llama"]
    shutil.copytree(pair.teacher, here / "teacher")
    write_templates(here / "t.yaml", one="w9 {{ mr }}", two="{{ mr }} w4")
    asked = f"--dataset {train_csv} --templates {here / 't.yaml'}"
    assert (
        run(f"kd --teacher {here / 'teacher'} --student {pair.student} {asked} {FLAGS} --output_dir {here / 'kd'}")
        == 0
    )
    assert run(f"cache_teacher --teacher {here / 'teacher'} {asked} {OF_CACHE} --k 0 --output {here / 'cache'}") == 0
    shutil.rmtree(here / "teacher")
    return here, f"kd --teacher_cache {here / 'cache'} --student {pair.student} {asked} {FLAGS}"


def weights(directory) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def assert_same_student(one, other, **tolerance) -> None:
    for name, weight in weights(one).items():
        torch.testing.assert_close(weight, weights(other)[name], **(tolerance or {"rtol": 0, "atol": 0}))


def test_the_student_is_that_of_the_teacher_itself_which_is_not_there(place, capsys):
    here, command = place
    assert run(f"{command} --save_steps 2 --output_dir {here / 'cached'}") == 0
    assert "cached: 30 targets, all ids at each token, float32. It is not loaded." in capsys.readouterr().out
    assert_same_student(here / "cached", here / "kd", rtol=1e-4, atol=1e-5)
    with_teacher, cached = metrics_of(here / "kd"), metrics_of(here / "cached")
    assert set(with_teacher) - set(cached) <= {"teacher"} and "teacher_nll_per_token" not in cached["after"]
    for name in set(cached["after"]) & set(with_teacher["after"]):
        assert cached["after"][name] == pytest.approx(with_teacher["after"][name], rel=1e-3), name
    assert "cached: 30 targets" in (here / "cached" / "README.md").read_text()


@pytest.mark.slow(0.6)
def test_it_is_continued_to_the_same_student(place, tmp_path, capsys):
    (here, command), out = place, tmp_path / "out"
    if not (here / "cached").exists():
        assert run(f"{command} --save_steps 2 --output_dir {here / 'cached'}") == 0
    first = command.replace("--max_steps 4", "--max_steps 2")
    assert run(f"{first} --save_steps 2 --output_dir {out}") == 0
    assert run(f"{command} --save_steps 2 --resume --output_dir {out}") == 0
    assert_same_student(out, here / "cached")
    header = json.loads((here / "cache" / "cache.json").read_text())
    shutil.copytree(here / "cache", tmp_path / "other")
    (tmp_path / "other" / "cache.json").write_text(json.dumps({**header, "names": ["other"]}))
    other = command.replace(f"{here / 'cache'} ", f"{tmp_path / 'other'} ").replace("--max_steps 4", "--max_steps 6")
    assert run(f"{other} --save_steps 2 --resume --output_dir {out}") == 2
    assert "is of another run: command.AbsentTeacherArguments.teacher_cache was" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_learn_what_one_does(place, tmp_path):
    here, command = place
    if not (here / "cached").exists():
        assert run(f"{command} --save_steps 2 --output_dir {here / 'cached'}") == 0
    flags = command.removeprefix("kd ").replace("_batch_size 8", "_batch_size 4")
    launch = f"accelerate launch --config_file {ROOT}/accelerate_configs/cpu_2_processes.yaml {ROOT}/recipes/kd.py"
    finished = launched(f"{launch} {flags} --output_dir {tmp_path}", directory=tmp_path, environment=ENVIRONMENT)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert_same_student(tmp_path, here / "cached", rtol=1e-4, atol=1e-5)


def test_an_unfinished_cache_is_refused_and_finished_by_the_same_command(checkpoints, train_csv, tmp_path, capsys):
    teacher = checkpoints["llama"].teacher
    command = f"cache_teacher --teacher {teacher} --dataset {train_csv} {OF_CACHE} --k 5 --output {tmp_path / 'cache'}"
    assert run(command) == 0
    assert "30 targets, 5 of 25 ids at each token, float32" in capsys.readouterr().out
    (tmp_path / "cache" / "shard-00002.safetensors").unlink()
    of_kd = (
        f"kd --student {checkpoints['llama'].student} --dataset {train_csv} {FLAGS} --output_dir {tmp_path / 'out'}"
    )
    assert run(f"{of_kd} --teacher_cache {tmp_path / 'cache'}") == 2
    assert (
        "1 of its 4 shards are missing. The command that makes it goes on where it stopped" in capsys.readouterr().err
    )
    kept = (tmp_path / "cache" / "shard-00000.safetensors").stat().st_mtime_ns
    assert run(command) == 0
    assert (tmp_path / "cache" / "shard-00000.safetensors").stat().st_mtime_ns == kept
    assert run(f"{of_kd} --teacher_cache {tmp_path / 'cache'} --max_steps 1") == 0
    assert run(f"{command} --k 6") == 2
    assert "is a cache of something else: k is 5 and would be 6" in capsys.readouterr().err
    assert run(f"{command} --k 6 --overwrite_output_dir") == 0
    (tmp_path / "cache" / "cache.json").write_text('{"entries": []}')
    assert run(f"{command} --overwrite_output_dir") == 2
    assert "holds files that are no teacher cache of this version" in capsys.readouterr().err
    assert (tmp_path / "cache" / "shard-00000.safetensors").exists()


def test_prompts_over_their_cap_are_cut_as_in_training(checkpoints, train_csv, tmp_path, capsys):
    """Where the student's template makes the teacher's questions: sources of two to five words after two others."""
    pair, out = checkpoints["llama"], tmp_path / "out"
    asked = f"--dataset {train_csv} --student_template 'w9 w10 {{{{ mr }}}}' --max_prompt_length 4"
    assert run(f"cache_teacher --teacher {pair.teacher} {asked} {OF_CACHE} --output {tmp_path / 'cache'}") == 0
    assert "of 30 prompts are longer than --max_prompt_length 4" in capsys.readouterr().out
    of_kd = f"kd --teacher_cache {tmp_path / 'cache'} --student {pair.student} {asked} {FLAGS} --output_dir {out}"
    assert run(f"{of_kd} --max_steps 1") == 0
    assert run(f"{of_kd} --overwrite_output_dir --max_prompt_length 5") == 2
    assert "Row 1: A target of the prompt" in capsys.readouterr().err


def test_flags_of_absent_teachers_are_refused_without_one(checkpoints, train_csv, tmp_path, capsys):
    pair = checkpoints["llama"]
    command = (
        f"kd --teacher {pair.teacher} --student {pair.student} --dataset {train_csv} {FLAGS} --output_dir {tmp_path}"
    )
    for flag in ("--teacher_server_model nonsense", "--teacher_api_key_env NO_SUCH", "--teacher_server_timeout 5.0"):
        assert run(f"{command} {flag}") == 2
        assert f"{flag} has no effect with a teacher in this process: leave it out" in capsys.readouterr().err
