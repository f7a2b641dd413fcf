"""The rehearsals of real size: checkpoints, memory of processes, and a case in small."""

import json
import shlex
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from rlkd_trl.teachers import Teacher
from tests.recipes.command_lines import ROOT, main_of, run

MIB = 2**20
SMALL = {"d_model": 64, "d_ff": 96, "heads": 2, "layers": 2}


@pytest.fixture
def names(monkeypatch) -> SimpleNamespace:
    """The script's global names; it imports its neighbours, as a script does."""
    monkeypatch.syspath_prepend(ROOT / "recipes" / "benchmarks")
    return SimpleNamespace(**main_of("benchmarks/true_size").__globals__)


def checkpoint(names, directory, monkeypatch, **settings):
    """A small one, in several shards, as transformers loads it."""
    monkeypatch.setitem(names.write_checkpoint.__globals__, "SHARD_BYTES", MIB)
    names.write_checkpoint(names.Size(**SMALL, **settings), directory, torch.bfloat16)
    return AutoModelForSeq2SeqLM.from_pretrained(directory, output_loading_info=True)


@pytest.mark.parametrize("v1_1", [True, False])
def test_a_checkpoint_has_all_weights_in_shards(v1_1, names, tmp_path, monkeypatch):
    model, report = checkpoint(names, tmp_path, monkeypatch, v1_1=v1_1)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16 and model.config.vocab_size == 32_128 == model.lm_head.out_features
    assert (model.lm_head.weight is model.shared.weight) == (not v1_1)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    query = model.encoder.block[1].layer[0].SelfAttention.q.weight.detach().float()
    assert query.std() == pytest.approx(64**-0.5, rel=0.05) and model.encoder.final_layer_norm.weight.eq(1).all()
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 32_100


def test_what_stays_in_the_file_is_what_is_not_quantised(names, tmp_path, monkeypatch):
    """Counted in a teacher that bitsandbytes has quantised."""
    pytest.importorskip("bitsandbytes")
    model, _ = checkpoint(names, tmp_path, monkeypatch)
    whole = sum(weight.nbytes for weight in model.parameters())
    assert names.bytes_left_in_file(tmp_path, names.WAYS["bfloat16"]) == whole
    assert names.bytes_left_in_file(tmp_path, names.WAYS["offload"]) == 0
    teacher = Teacher.from_pretrained(str(tmp_path), dtype="bfloat16", quantization="int8")
    left = sum(weight.nbytes for weight in teacher.model.parameters() if weight.dtype != torch.int8)
    assert left < 0.99 * whole
    for way in ("int8", "nf4"):  # whose scales, which the planner's difference has, are under 2 % here
        assert names.bytes_left_in_file(tmp_path, names.WAYS[way]) == pytest.approx(left, rel=0.02)


@pytest.mark.slow
def test_of_shards_in_files_a_layer_at_a_time_is_gathered(names, tmp_path, monkeypatch):
    """The head is the largest layer, and the largest weight that DeepSpeed fetches ahead; its own default is read."""
    zero = pytest.importorskip("deepspeed.runtime.zero.config")
    checkpoint(names, tmp_path, monkeypatch)
    ahead = zero.DeepSpeedZeroConfig().prefetch_bucket_size
    assert ahead == names.PREFETCHED
    teacher = names.Checkpoint.of("--teacher", str(tmp_path))
    whole = names.weight_bytes(teacher.build(torch.bfloat16))
    assert 2 * (2 * 32_128 * 64 + ahead) > whole
    assert names.gathered_from_files(teacher) == whole
    monkeypatch.setitem(names.gathered_from_files.__globals__, "PREFETCHED", ahead // 10_000)
    assert names.gathered_from_files(teacher) == 2 * (2 * 32_128 * 64 + ahead // 10_000) < whole
    # It is what the planned number has, and only of files: 10^10 bytes gathered are the most, and buffers on top.
    monkeypatch.setitem(names.planned_bytes.__globals__, "gathered_from_files", lambda teacher: 10**10)
    student = tmp_path / "student"
    names.write_checkpoint(names.Size(**SMALL, v1_1=False), student, torch.float32)
    (in_memory, same), (printed, in_files), (also_printed, with_more) = (
        names.planned_bytes(tmp_path, student, 4, names.Way("offload", processes=2, buffers=buffers))
        for buffers in (0, 10**6, 10**9)
    )
    assert in_memory == same == printed == also_printed < 10**10
    assert 10**10 < in_files - 10**6 < 10**10 + in_memory and with_more - in_files == 10**9 - 10**6


def test_shards_in_files_are_rehearsed_by_two_processes(names, tmp_path, monkeypatch):
    """With the allocator's settings, and beside the libraries that they import."""
    scope, started = names.rehearse.__globals__, []

    def noted(command: list[str], variables=None):
        started.append((command, dict(variables or {})))
        return names.Run(9.0, 8.0, peak=3, mapped=1, own=2)

    for name, stand_in in (
        ("run", noted),
        ("write_checkpoint", lambda *arguments: None),
        ("planned_bytes", lambda *arguments: (2 * 2**30, 3 * 2**30)),
        ("bytes_left_in_file", lambda *arguments: 0),
        ("logged", lambda output_dir: {}),
    ):
        monkeypatch.setitem(scope, name, stand_in)
    row = names.rehearse("t0_11b-offload", tmp_path, 2)
    assert (row["plan_prints_gib"], row["planned_gib"]) == (2, 3)
    (training, variables), (libraries, _) = started
    assert {"accelerate.commands.launch", "--teacher_placement", "offload", str(tmp_path / "shards")} < set(training)
    assert training[training.index("--teacher_offload_path") + 1] == str(tmp_path / "shards")
    assert variables == {"MALLOC_MMAP_THRESHOLD_": str(MIB), "MALLOC_TRIM_THRESHOLD_": str(MIB)}
    assert libraries[-1].endswith(", deepspeed")
    names.rehearse("t0_11b-int8", tmp_path, 2)
    (training, variables), (libraries, _) = started[2:]
    assert "--teacher_offload_path" not in training and "accelerate.commands.launch" not in training
    assert variables == {} and "deepspeed" not in libraries[-1]


@pytest.mark.slow(0.9)
def test_memory_of_a_family_of_processes(names, tmp_path):
    """The child's 200 MiB of its own are seen, and of a file of 100 MiB what has been read of it."""
    (tmp_path / "file").write_bytes(bytes(100 * MIB))
    child = f"""
import mmap, time
own = b"x" * {200 * MIB}
with open({str(tmp_path / "file")!r}, "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    total = sum(mapped[::4096])
    time.sleep(0.5)
"""
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    found = names.run([sys.executable, "-c", parent])
    assert 200 * MIB < found.own < 240 * MIB
    assert 100 * MIB < found.mapped < 140 * MIB and 300 * MIB < found.peak < 360 * MIB
    assert found.wall_seconds > 0.5 and 0 < found.cpu_seconds < 10


def test_a_rehearsal_that_fails_says_why(names):
    with pytest.raises(SystemExit, match="no such weights"):
        names.run([sys.executable, "-c", "import os; raise SystemExit(os.environ['WHY'])"], {"WHY": "no such weights"})


@pytest.mark.slow
def test_a_case_in_small(names, tmp_path, monkeypatch):
    """The recipe runs with the preset's settings, in this process; its memory is another's."""
    scope, commands = names.rehearse.__globals__, []

    def in_this_process(command: list[str], variables=None):
        commands.append(command)
        if "-c" not in command:
            assert run(shlex.join(["ppo_kd", *command[2:]])) == 0
        return names.Run(9.0, 8.0, peak=3 * 2**30, mapped=2**30, own=2 * 2**30)

    preset = names.TEACHERS["t0_3b"].preset
    monkeypatch.setitem(scope, "TEACHERS", {"t0_3b": names.Size(**SMALL, preset=preset, completion=4)})
    monkeypatch.setitem(scope, "STUDENT", names.Size(**SMALL, v1_1=False))
    monkeypatch.setitem(scope, "run", in_this_process)
    flags = ["--work_dir", tmp_path / "work", "--results_dir", tmp_path, "--cases", "t0_3b-bfloat16", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["true_size.py", *map(str, flags)])
    names.main()
    (row,) = json.loads((tmp_path / "true_size.json").read_text())
    # A teacher of 2 bytes a weight, and a student with gradients and two moments in float32, are the least.
    of_student = names.T5ForConditionalGeneration(names.Size(**SMALL, v1_1=False).config()).num_parameters()
    assert row["libraries_gib"] == 2, "their own"
    assert row["own_gib"] == 2 and row["training_cpu_seconds"] > 0 and row["seconds/score"] > 0
    teacher = names.Size(**SMALL).config()
    weights = sum(weight.numel() for weight in names.T5ForConditionalGeneration(teacher).parameters())
    head = teacher.vocab_size * teacher.d_model  # of v1.1, which transformers ties before it is loaded
    assert row["in_file_gib"] * 2**30 == 2 * (weights + head)
    assert 2 * (weights + head) + 16 * of_student < row["planned_gib"] * 2**30 < 2**30
    assert not (tmp_path / "work").exists(), "all is deleted at the end"
    line = next(line for line in (tmp_path / "true_size.md").read_text().splitlines() if "t0_3b-bfloat16" in line)
    assert (
        "| 2.0 + 0.0 |" in line
        and line.split("|")[-2].strip() == f"{(2 + row['in_file_gib']) / (2 + row['planned_gib']):.2f}"
    )
    # Another case stays where it is, and is not lost.
    names.add_result(tmp_path, {**row, "case": "t0_11b-nf4", "own_gib": 5.0})
    names.add_result(tmp_path, {**row, "own_gib": 3.0})
    found = json.loads((tmp_path / "true_size.json").read_text())
    assert [(one["case"], one["own_gib"]) for one in found] == [("t0_3b-bfloat16", 3.0), ("t0_11b-nf4", 5.0)]
    assert "--config" in commands[0] and preset in commands[0]


def test_one_step_is_too_few(names, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["true_size.py", "--steps", "1"])
    with pytest.raises(SystemExit) as exit:
        names.main()
    assert exit.value.code == 2 and "--steps" in capsys.readouterr().err


def test_a_case_that_fails_leaves_no_checkpoint(names, tmp_path, monkeypatch):
    def fails(*arguments):
        raise SystemExit("no memory")

    monkeypatch.setitem(names.main.__globals__, "rehearse", fails)
    monkeypatch.setattr(sys, "argv", ["true_size.py", "--work_dir", str(tmp_path / "work")])
    with pytest.raises(SystemExit, match="no memory"):
        names.main()
    assert not (tmp_path / "work").exists()
    (tmp_path / "work").mkdir()
    with pytest.raises(SystemExit) as exit:
        names.main()
    assert exit.value.code == 2 and (tmp_path / "work").exists(), "what is of somebody else is not deleted"


def test_a_page_keeps_what_people_wrote_below_the_results(names, tmp_path):
    """Written anew, it has the new results and the old remarks, once, also where a result has a heading.

    The line may end in a space, or the page with it.
    """
    names.write_results(tmp_path, "page", {}, "# Old\n\n## Part\n\nold\n")
    assert (tmp_path / "page.md").read_text() == "# Old\n\n## Part\n\nold\n"
    with (tmp_path / "page.md").open("a") as file:
        file.write("\n## Remarks\n\nSeen.\n\n### More\n\nAlso.\n")
    for new in ("first", "second"):
        names.write_results(tmp_path, "page", {}, f"# New\n\n{new}\n")
    assert (tmp_path / "page.md").read_text() == "# New\n\nsecond\n\n## Remarks\n\nSeen.\n\n### More\n\nAlso.\n"
    for end in ("## Remarks", "## Remarks \nSeen.\n"):
        (tmp_path / "page.md").write_text(f"# Old\n\n{end}")
        names.write_results(tmp_path, "page", {}, "# New\n")
        assert (tmp_path / "page.md").read_text() == f"# New\n\n{end}"
