"""Mistakes with teachers that are not in the process; rows of the same table as in `bad_inputs`."""

import json
import shutil
from pathlib import Path

import pytest

from rlkd_trl.teachers.cache import FORMAT
from tests.recipes.bad_inputs import DATA
from tests.recipes.command_lines import TWO_STEPS, run

_CACHED = "--teacher_cache cache"
ABSENT_CASES = [
    (("cache_teacher",), "--dtype bfloat16", "--dtype bfloat16: choose one of float32, float16"),
    (("cache_teacher",), "--ensemble median", "--ensemble median: choose one of probabilities, logits"),
    (("cache_teacher",), "--teacher_placement zero3", "a cache is written by one process, which holds the whole"),
    (("cache_teacher",), "--k -1", "--k -1 is out of range: 0 or more"),
    (("cache_teacher",), "--rows_per_shard 0", "--rows_per_shard 0 is out of range: 1 or more"),
    (("cache_teacher",), "--distillation_temperature 0", "--distillation_temperature 0.0 is out of range"),
    (("cache_teacher",), "--output data.csv", "--output data.csv is what --dataset data.csv reads"),
    (("cache_teacher",), "--output a_file", "--output a_file is a file: name a directory"),
    (("cache_teacher",), "--output not_a_cache", "--output not_a_cache holds files that are no teacher cache"),
    (("kd",), _CACHED, "--teacher teacher and --teacher_cache cache are teachers in place of each other"),
]
_KD = f"--student student {DATA} {TWO_STEPS} --max_completion_length 6 --output_dir out"
ABSENT_COMMANDS = [
    (f"kd {_KD} {_CACHED} {flags}", message)
    for flags, message in (
        ("--lmbda 0.5", "lmbda = 0.5: what the teacher says about the student's own samples cannot be in a cache"),
        ("--sequences teacher", "sequences = 'teacher': a cache cannot write new samples"),
        ("--alpha 0", "alpha = 0 reads no teacher, so the cache would not be used"),
        ("--distillation_temperature 2", "distillation_temperature = 2.0, and the cache was made at 1.0: give that"),
        ("--max_completion_length 7", "max_completion_length = 7, and the cache has targets of up to 6 tokens"),
        (
            "--template 'w3 {{ source }}'",
            "was made with no templates, and here they are template: give the same",
        ),
        ("--teacher_dtype bfloat16", "--teacher_dtype bfloat16 has no effect with --teacher_cache cache"),
        ("--teacher_column mr", "--teacher_column mr has no effect with --teacher_cache cache"),
        ("--dataset test.csv --eval_dataset data.csv", "Row 1: A target of the prompt"),
        ("--student other_tokenizer", "have different tokenizers"),
        ("--teacher_cache torn_cache", "torn_cache is not complete: 1 of its 4 shards are missing. The command that"),
        ("--teacher_cache cut_cache", "shard-00001.safetensors is damaged: delete it, and run the command again"),
        ("--teacher_cache not_a_cache", "not_a_cache is no teacher cache: it has no cache.json. Make one with"),
        ("--teacher_cache nowhere", "nowhere is no teacher cache: it has no cache.json"),
        ("--teacher_cache newer_cache", f"has format {FORMAT + 1}, and this version reads {FORMAT}: make it anew"),
        ("--teacher_cache ''", "--teacher_cache is empty: name something, or leave it out"),
        ("--output_dir cache", "--output_dir cache is what --teacher_cache cache reads, which would be overwritten"),
    )
] + [
    (f"{recipe} {_KD} --num_generations 2 {_CACHED}", "this method learns from the student's own samples: use kd.py")
    for recipe in ("ppo_kd", "rloo_kd", "reinforce_kd", "all_actions_kd")
]
# No server is there: what is wrong besides is found before it is asked.
_SERVED = "--teacher_server http://127.0.0.1:9 --teacher_tokenizer teacher"
_RL = f"{_KD} --num_generations 2"
ABSENT_COMMANDS += [
    (f"kd {_KD} {_SERVED}", "this method compares teacher and student over all tokens: use ppo_kd.py"),
    (f"all_actions_kd {_RL} {_SERVED}", "this method compares teacher and student over all tokens: use ppo_kd.py"),
    (f"rloo_kd {_RL} {_SERVED} --teacher teacher", "are teachers in place of each other: give one of them"),
    (f"kd {_KD} {_SERVED} {_CACHED}", "are teachers in place of each other: give one of them"),
    (f"rloo_kd {_RL} --teacher_server http://127.0.0.1:9", "--teacher_server needs --teacher_tokenizer: a directory"),
    (f"rloo_kd {_RL} {_SERVED}", "The teacher's server http://127.0.0.1:9/v1 cannot be asked: "),
    (f"ppo_kd {_RL} {_SERVED} --value expected", "V = 'expected' is a mean over the teacher's whole distribution"),
    (f"ppo_kd {_RL} {_SERVED} --value soft --tau 2", "V = 'soft' at tau = 2.0 needs the teacher's whole distribution"),
    (
        f"reinforce_kd {_RL} {_SERVED} --teacher_baseline False",
        "the teacher-forcing reward is of logits: they agree where it is shaped by the teacher's V",
    ),
    (f"rloo_kd {_RL} {_SERVED} --teacher_dtype bfloat16", "--teacher_dtype bfloat16 has no effect with"),
    (f"rloo_kd {_RL} {_SERVED} --teacher_weights 1", "--teacher_weights 1.0 has no effect with --teacher_server"),
    (f"rloo_kd {_RL} --teacher_server 127.0.0.1:9 --teacher_tokenizer teacher", "is no URL: give http://HOST:PORT"),
    (
        f"rloo_kd {_RL} --teacher_server http://me:word@127.0.0.1:9 --teacher_tokenizer teacher",
        "holds a name, a password or parameters, which would be written down with the run",
    ),
    (f"rloo_kd {_RL} {_SERVED} --teacher_api_key_env NO_SUCH_NAME", "names no variable of the environment"),
    (f"rloo_kd {_RL} {_SERVED} --teacher_server_timeout 0", "--teacher_server_timeout 0.0 is out of range"),
    (f"rloo_kd {_RL} {_SERVED} --teacher_server_concurrency 0", "--teacher_server_concurrency 0 is out of range"),
    (f"rloo_kd {_RL} --teacher_server http://127.0.0.1:9 --teacher_tokenizer nowhere/at/all", "is not a directory"),
    (f"kd {_KD} {_CACHED} --teacher_server_model x", "--teacher_server_model x has no effect with --teacher_cache"),
]
ABSENT_LOADED_CASES = [
    (("cache_teacher",), "--output cache --k 3", "cache is a cache of something else: k is 25 and would be 3. Name"),
]


def make_absent_files(here: Path) -> None:
    """Caches, sound and not, of the directory's teacher and data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        flags = f"--teacher teacher {DATA} --max_completion_length 6 --k 0 --rows_per_shard 9"
        assert run(f"cache_teacher {flags} --output cache") == 0
    for name in ("torn", "cut", "newer"):
        shutil.copytree(here / "cache", here / f"{name}_cache")
    (here / "torn_cache" / "shard-00003.safetensors").unlink()
    shard = here / "cut_cache" / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    header = here / "newer_cache" / "cache.json"
    header.write_text(json.dumps({**json.loads(header.read_text()), "format": FORMAT + 1}))
    (here / "not_a_cache").mkdir()
    (here / "not_a_cache" / "notes.txt").write_text("not one")
