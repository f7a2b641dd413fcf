"""`--streaming` in the recipes that train."""

import pytest
from safetensors.torch import load_file

from tests.recipes.command_lines import COLUMNS, SAMPLING, TWO_STEPS, metrics_of, run, word_rows, write_csv


@pytest.mark.parametrize("recipe", ["rloo_kd", pytest.param("kd --lmbda 0.5", marks=pytest.mark.slow)])
def test_distillation_from_a_stream_and_on(recipe, checkpoints, train_csv, test_csv, tmp_path, capsys):
    pair = checkpoints["t5-tied"]
    command = (
        f"{recipe} --teacher {pair.teacher} --student {pair.student} --dataset {train_csv} {COLUMNS} --streaming "
        f"--shuffle_buffer_size 8 --eval_dataset {test_csv} --student_template 'w9 {{{{ mr }}}}' "
        f"--max_prompt_length 4 {TWO_STEPS} {SAMPLING} --save_steps 1 --output_dir {tmp_path}"
    )
    assert run(command) == 0
    said = capsys.readouterr().out
    assert "read while training goes on. Its first 30 rows are checked now" in said
    assert said.count("prompts are longer than --max_prompt_length 4") == 2  # the first rows', the held-out ones'
    assert metrics_of(tmp_path).keys() == {"teacher", "before", "after"}
    assert run(f"{command} --max_steps 3 --resume") == 0
    assert run(f"{command} --max_steps 4 --shuffle_buffer_size 9 --resume") == 2


def test_supervised_training_from_a_stream(checkpoints, train_csv, tmp_path):
    model = checkpoints["t5-tied"].student
    line = f"sft --dataset {train_csv} {COLUMNS} --streaming {TWO_STEPS} --output_dir {tmp_path}"
    assert run(f"{line} --student {model}") == 0
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--max_steps -1", "say with max_steps how long to train"),
        ("--max_rows 5", "--max_rows counts the inputs of data that is read at once"),
        ("--dataset_split train[:5]", "is a slice of rows"),
        ("--source_column nothing", "`--source_column nothing` is not in the data"),
        ("", "cannot hold out a share of rows whose number it does not know: give --eval_dataset"),
    ],
)
def test_what_a_stream_cannot_do(flags, message, checkpoints, train_csv, test_csv, tmp_path, capsys):
    pair = checkpoints["t5-tied"]
    held_out = f"--eval_dataset {test_csv}" if flags else ""
    line = f"rloo_kd --teacher {pair.teacher} --student {pair.student} --dataset {train_csv} {COLUMNS} --streaming"
    assert run(f"{line} {held_out} --max_steps 1 {flags} --output_dir {tmp_path / 'run'}") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_streams_need_data_and_a_tokenizer(train_csv, tmp_path, capsys):
    assert run(f"rloo_kd --streaming --max_steps 1 --output_dir {tmp_path / 'run'}") == 2
    assert "--streaming" in capsys.readouterr().err
    assert run(f"sft --dataset {train_csv} {COLUMNS} --streaming --max_steps 1 --output_dir {tmp_path / 'run'}") == 2
    assert "give --student or --tokenizer" in capsys.readouterr().err


def test_a_later_row_that_is_wrong_ends_the_run_with_a_message(checkpoints, test_csv, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rlkd_trl.data.streams.ROWS_AT_A_TIME", 16)
    rows = word_rows(40)
    rows[30]["mr"] = ""
    data, pair = write_csv(tmp_path / "data.csv", rows), checkpoints["t5-tied"]
    line = f"rloo_kd --teacher {pair.teacher} --student {pair.student} --dataset {data} {COLUMNS} --streaming "
    line += f"--shuffle_buffer_size 0 --eval_dataset {test_csv} {TWO_STEPS} {SAMPLING} --max_steps 20"
    assert run(f"{line} --output_dir {tmp_path / 'run'}") == 2
    assert (
        "counted from row 17 of the order in which it is read: Row 15: column `mr` is empty" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        ("", "give --eval_dataset"),
        ("--eval_dataset {test} --max_steps -1", "say with max_steps how long to train"),
        ("--eval_dataset {test} --dataloader_num_workers 2", "each worker would read the whole stream"),
        ("--eval_dataset {test} --losses mlm_ce+nsp_ce", "nsp_ce pairs texts of all data at random"),
        ("--stages task", "--streaming is for the texts of a general stage"),
    ],
)
def test_what_a_stream_cannot_do_for_an_encoder(flags, message, encoders, tmp_path, capsys):
    command = f"encoder_kd --losses mlm_ce --student {encoders.student} --teacher {encoders.general} --stages general "
    command += (
        f"--dataset {encoders.train} --source_column text --streaming --max_steps 1 --output_dir {tmp_path / 'run'}"
    )
    assert run(f"{command} {flags.format(test=encoders.test)}") == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow(0.8)
def test_an_encoder_from_a_stream_and_on(encoders, tmp_path):
    """Two steps and six more are eight: the same rows, with the same tokens masked."""
    command = (
        f"encoder_kd --config minilmv2 --teacher {encoders.general} --student {encoders.student} --losses mlm_ce "
        f"--mlm_probability 0.15 --dataset {encoders.train} --source_column text --eval_dataset {encoders.test} "
        "--streaming --shuffle_buffer_size 8 --per_device_train_batch_size 8 --max_length 16 "
        "--lr_scheduler_type constant --disable_tqdm True --save_steps 2"
    )
    assert run(f"{command} --max_steps 8 --output_dir {tmp_path / 'whole'}") == 0
    assert run(f"{command} --max_steps 2 --output_dir {tmp_path / 'parts'}") == 0
    assert run(f"{command} --max_steps 8 --resume --output_dir {tmp_path / 'parts'}") == 0
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(whole[name].equal(parts[name]) for name in whole)
