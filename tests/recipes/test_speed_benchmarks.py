"""The speed benchmarks (steps, scoring, sampling, GPU, losses): their arithmetic against counts, and tiny runs."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.distributed.launching import run_forked
from tests.recipes.command_lines import ROOT, main_of, run

TINY = "--prompt_tokens 5 --completion_tokens 3 --prompts 2 --samples 2 --vocabulary 40"


@pytest.fixture(autouse=True)
def beside_workload(monkeypatch):
    """The scripts import the file `workload` beside them, as scripts may."""
    monkeypatch.syspath_prepend(ROOT / "recipes" / "benchmarks")


def names_of(benchmark: str) -> SimpleNamespace:
    return SimpleNamespace(**main_of(f"benchmarks/{benchmark}").__globals__)


@pytest.fixture
def forked_measurements(monkeypatch, tmp_path):
    """The scripts' processes are forks of one that has imported everything and computed nothing."""

    def run_script(words: list[str], **settings) -> SimpleNamespace:
        printed = run_forked("tests.distributed.forked_script", tmp_path, [{}], *words[1:])
        return SimpleNamespace(returncode=0, stdout=printed)

    monkeypatch.setattr(subprocess, "run", run_script)


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# Arithmetic


@torch.no_grad()
def counted(model, prompts: int, completions: int, S: int, T: int) -> int:
    """torch's own count of a forward pass of `completions` pairs whose encoder reads `prompts` of them."""
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        encoded = model.get_encoder()(input_ids=torch.ones(prompts, S, dtype=torch.long))
        encoded.last_hidden_state = encoded.last_hidden_state.repeat_interleave(completions // prompts, dim=0)
        decoder_ids = torch.ones(completions, T, dtype=torch.long)
        model(encoder_outputs=encoded, decoder_input_ids=decoder_ids, use_cache=False)
    return counter.get_total_flops()


def test_the_operations_are_those_that_torch_counts():
    import workload

    size = workload.Dimensions(d_model=24, d_ff=20, heads=3, layers=2, d_kv=5)
    shape = workload.Shape(prompt_tokens=7, completion_tokens=4, prompts=2, samples=3, vocabulary=50)
    model = workload.random_t5(size, 50, seed=0)
    assert workload.forward_flops(size, shape, shared=False) == counted(model, 6, 6, S=7, T=4)
    # With each prompt read once: four encoders less, and as many cross-attention keys and values in each layer.
    saved_keys_values = (6 - 2) * size.layers * 7 * 2 * (2 * 24 * 15)
    assert workload.forward_flops(size, shape) == counted(model, 2, 6, S=7, T=4) - saved_keys_values
    # Token by token, position t looks at t keys: 1 + 2 + 3 + 4 = 10 instead of 16.
    skipped = 6 * size.layers * (16 - 10) * 2 * (2 * 15)
    assert workload.forward_flops(size, shape, cached=True) == workload.forward_flops(size, shape) - skipped


@torch.no_grad()
def test_the_operations_of_a_decoder_are_those_that_torch_counts():
    import workload

    size = workload.Dimensions(d_model=24, d_ff=20, heads=3, layers=2, d_kv=8)
    shape = workload.Shape(prompt_tokens=7, completion_tokens=4, prompts=2, samples=3, vocabulary=50)
    model = workload.random_decoder(size, 50, seed=0)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.ones(6, 11, dtype=torch.long), use_cache=False, logits_to_keep=4)
    # Eager attention also multiplies the prompt's queries with the completion's keys: 7 × 4 pairs, always hidden.
    hidden = 6 * size.layers * 7 * 4 * 2 * (2 * 24)
    assert workload.decoder_flops(size, shape, shared=False) == counter.get_total_flops() - hidden
    # Each prompt read once: four readings less, each of 7 tokens and 7 × 7 pairs.
    per_token = 4 * 2 * 24 * 24 + 3 * 2 * 24 * 20
    saved = (6 - 2) * size.layers * (7 * per_token + 49 * 2 * (2 * 24))
    assert workload.decoder_flops(size, shape) == workload.decoder_flops(size, shape, shared=False) - saved
    # Token by token, the last four look at 1 + 2 + 3 + 4 = 10 of themselves instead of 16.
    skipped = 6 * size.layers * (16 - 10) * 2 * (2 * 24)
    assert workload.decoder_flops(size, shape, cached=True) == workload.decoder_flops(size, shape) - skipped


def test_prompts_are_the_same_as_ids_and_as_texts():
    import workload

    shape = workload.Shape(prompt_tokens=6, completion_tokens=3, prompts=4, samples=1, vocabulary=30)
    ids = workload.word_tokenizer(30)(workload.prompt_texts(shape, 2))["input_ids"]
    assert ids == workload.prompt_ids(shape, 2).tolist() and all(row[-1] == 1 for row in ids)
    assert not torch.equal(workload.prompt_ids(shape, 2), workload.prompt_ids(shape, 3))


def test_the_head_is_untied():
    """As in T0, and in the other library's version of transformers."""
    import workload

    model = workload.random_t5(workload.Dimensions(d_model=8, d_ff=8, heads=1, layers=1), 30, seed=0)
    assert model.lm_head.weight is not model.shared.weight


def test_the_exponent_of_a_power_law():
    exponent = names_of("growth").exponent
    assert exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)
    assert exponent([1, 2, 4, 8], [5, 5, 5, 5]) == pytest.approx(0)
    assert math.isnan(exponent([1, 2], [0.0, 3.0])), "nothing is no power of anything"


def test_the_floor_of_a_phase():
    """The reference's log-probabilities are a forward pass, where they are taken; the student's come from sampling."""
    names = names_of("step")
    student = names.forward_flops(names.STUDENT, names.Shape(64, 32, 16, 4))
    flops = [
        names.phase_flops(names.Shape(64, 32, 16, 4), reference=reference)["update"] / student
        for reference in (False, True)
    ]
    assert flops == [3, 4]


# Runs


@pytest.mark.slow
@pytest.mark.parametrize("script", ["step", "decoder_step"])
def test_a_step(script, capsys):
    """Two updates a step: completions / update batch."""
    pytest.importorskip("resource")
    assert run(f"benchmarks/{script} {TINY} --steps 2 --update_batch_size 2") == 0
    found = last_line(capsys)
    phases = found["phases"]
    assert list(phases) == ["generate", "score", "update"]
    assert all(phase["cpu_seconds"] > 0 and phase["gflop"] > 0 for phase in phases.values())
    assert len(found["cpu_seconds_of_steps"]) == 2
    # Medians of two are means, and phases add up to the step.
    assert sum(phase["cpu_seconds"] for phase in phases.values()) == pytest.approx(found["total_cpu_seconds"])
    rate = found["matmul_gflop_per_cpu_second"]
    for phase in phases.values():
        assert phase["floor_ratio"] == pytest.approx(phase["cpu_seconds"] * rate / phase["gflop"])
    assert found["peak_mib"] == max(phase["peak_mib"] for phase in phases.values()) > found["extra_mib"]


@pytest.mark.slow
def test_the_step_of_trl(capsys):
    """It imports nothing of this package, and its last line has what ours has."""
    pytest.importorskip("resource")
    assert run(f"benchmarks/trl_rloo_step {TINY} --steps 1 --update_batch_size 2 --beta 0.05") == 0
    found = last_line(capsys)
    assert list(found["phases"]) == ["generate", "score", "update"]
    assert all(phase["cpu_seconds"] > 0 for phase in found["phases"].values())
    for file in ("trl_rloo_step", "trl_0_11_step", "step_phases", "workload"):
        assert "rlkd_trl" not in (ROOT / "recipes" / "benchmarks" / f"{file}.py").read_text()


@pytest.mark.parametrize("script", ["step", "decoder_step"])
def test_a_step_refuses_a_batch_that_does_not_divide(script, capsys):
    assert run(f"benchmarks/{script} {TINY} --update_batch_size 3") == 2
    assert "4 completions are not a multiple of --update_batch_size" in capsys.readouterr().err


def test_ratios_are_theirs_over_ours(monkeypatch):
    def result(totals, generate, peak, extra, rate):
        phases = {"generate": {"cpu_seconds": generate}, "score": {"cpu_seconds": 1.0}, "update": {"cpu_seconds": 2.0}}
        found = {"cpu_seconds_of_steps": totals, "phases": phases, "peak_mib": peak, "extra_mib": extra}
        return {**found, "matmul_gflop_per_cpu_second": rate}

    said = {
        "ours": [result([2.0, 3.0], 0.5, 600, 100, 90), result([4.0], 1.5, 800, 300, 96)],
        "theirs": [result([10.0, 12.0], 2.0, 1200, 400, 100), result([14.0], 4.0, 1600, 1200, 90)],
    }
    import step_phases

    monkeypatch.setattr(step_phases, "in_turn", lambda commands, rounds: said)
    found = step_phases.compare(["ours"], ["theirs"], 2, "trl")
    assert found["times_faster"] == 12 / 3  # medians of 10, 12, 14 and of 2, 3, 4
    assert found["times_faster_by_phase"] == {"generate": 3.0 / 1.0, "score": 1, "update": 1}
    assert (found["peak_memory_ratio"], found["extra_memory_ratio"]) == (700 / 1400, 200 / 800)  # medians of runs
    assert (found["matmul_gflop_per_cpu_second"], found["trl"]["matmul_gflop_per_cpu_second"]) == (93, 95)


def results_beside_another_library() -> dict:
    """Floors of 0.5, 2 and 1 s; 12 s over ours of 5."""

    def phase(cpu_seconds, floor_ratio):
        return {"cpu_seconds": cpu_seconds, "floor_ratio": floor_ratio}

    theirs = {"generate": {"cpu_seconds": 3.0}, "score": {"cpu_seconds": 5.0}, "update": {"cpu_seconds": 4.0}}
    return {
        "phases": {"generate": phase(1.0, 2.0), "score": phase(2.5, 1.25), "update": phase(1.5, 1.5)},
        "times_faster_by_phase": {"generate": 3.0, "score": 2.0, "update": 4 / 1.5},
        **{"total_cpu_seconds": 5.0, "cpu_seconds_of_steps": [4.9, 5.1], "times_faster": 2.4},
        **{"peak_mib": 1000.0, "extra_mib": 250.0, "peak_memory_ratio": 0.5, "extra_memory_ratio": 0.25},
        "matmul_gflop_per_cpu_second": 101.5,
        "trl": {
            "phases": theirs,
            **{
                "total_cpu_seconds": 12.0,
                "cpu_seconds_of_steps": [11.5, 12.5],
                "peak_mib": 2000.0,
                "extra_mib": 1000.0,
            },
            "matmul_gflop_per_cpu_second": 99.5,
            "versions": {"trl": "0.11.4", "transformers": "4.46.3"},
        },
    }


def test_the_page_of_steps_has_every_shape(tmp_path):
    """And other settings; one measured again takes its old place; what people wrote stays."""
    import step_results
    from workload import Shape

    def add(shape, found, beta=0.05):
        step_results.add_result(tmp_path, "step", "Steps", shape, {"beta": beta}, found, "trl")

    found = results_beside_another_library()
    add(Shape(64, 32, 16, 4), found), add(Shape(256, 32, 8, 8), found)
    with (tmp_path / "step.md").open("a") as page:
        page.write("\n## Remarks\n\nSeen.\n")
    add(Shape(64, 32, 16, 4), {**found, "peak_mib": 990.0})
    add(Shape(64, 16, 16, 4, 50), found, beta=0)
    shapes = [
        "64-token prompts, 16 prompts × 4 samples (completion tokens 32, words 8192, beta 0.05)",
        "256-token prompts, 8 prompts × 8 samples (completion tokens 32, words 8192, beta 0.05)",
        "64-token prompts, 16 prompts × 4 samples (completion tokens 16, words 50, beta 0)",
    ]
    saved = json.loads((tmp_path / "step.json").read_text())
    assert {shape: one["peak_mib"] for shape, one in saved.items()} == dict(
        zip(shapes, (990, 1000, 1000), strict=True)
    )
    page = (tmp_path / "step.md").read_text()
    lines = page.splitlines()
    headings = [line for line in lines if line.startswith("#")]
    assert headings == ["# Steps", *(f"## {one}" for one in shapes), "## Remarks"]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert rows[0][1] == "TRL 0.11.4, CPU s"
    assert rows[2] == ["generate", "3.00", "1.00", "3.00", "0.50", "2.00"]
    assert rows[5] == ["step", "12.00", "5.00", "2.40", "3.50", "1.43"]
    assert "ours 4.90 to 5.10, theirs 11.50 to 12.50" in page
    assert "Peak memory: 990 MiB, theirs 2000 (ratio 0.500)" in page
    assert page.count("Made by `python") == 3 and page.endswith("\n\nSeen.\n")


@pytest.mark.parametrize("script", ["step", "decoder_step"])
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--results_dir out", "give --versus too"),
        ("--results_dir a_file --versus {python}", "--results_dir a_file is a file: name a directory"),
        ("--versus nowhere/python", "--versus nowhere/python is no program"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused(script, flags, said, tmp_path, monkeypatch, capsys):
    """Before anything is measured."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").touch()
    assert run(f"benchmarks/{script} {TINY} --update_batch_size 2 {flags.format(python=sys.executable)}") == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["step", "decoder_step"])
def test_results_are_written_beside_another_librarys(script, tmp_path, monkeypatch, capsys):
    main = main_of(f"benchmarks/{script}")
    asked = []

    def compared(ours, theirs, rounds, name):
        asked.append((theirs[0], rounds))
        found = results_beside_another_library()
        return {**found, name: found.pop("trl")}

    monkeypatch.setitem(main.__globals__, "compare", compared)
    flags = f"{TINY} --update_batch_size 2 --versus {sys.executable} --rounds 2 --results_dir {tmp_path}"
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags.split()])
    main()
    assert asked == [(sys.executable, 2)] and last_line(capsys)["times_faster"] == 2.4
    (shape,) = json.loads((tmp_path / f"{script}.json").read_text())
    settings = "completion tokens 3, words 40, completions of an update 2, beta 0.05"
    assert shape == f"5-token prompts, 2 prompts × 2 samples ({settings})"


def test_commands_take_turns(tmp_path):
    log = tmp_path / "log"
    code = f"import sys; open({str(log)!r}, 'a').write(sys.argv[1]); print('chatter'); print('{{\"a\": 1}}')"
    commands = {name: [sys.executable, "-c", code, name] for name in "xy"}
    import step_phases

    assert step_phases.in_turn(commands, 2) == {"x": [{"a": 1}] * 2, "y": [{"a": 1}] * 2}
    assert log.read_text() == "xyxy"


def test_a_command_that_fails_is_named():
    import step_phases

    with pytest.raises(SystemExit, match="no TRL here"):
        step_phases.in_turn({"x": [sys.executable, "-c", "raise ValueError('no TRL here')"]}, 1)


def test_scoring(monkeypatch, capsys):
    """Memory comes from fresh processes, which are left out here; the run itself checks that both ways agree."""
    main = main_of("benchmarks/scoring")
    mib = {"naive": 80.0, "ours": 20.0}
    monkeypatch.setitem(main.__globals__, "extra_mib_in_children", lambda way, *args: mib[way])
    small = main.__globals__["Dimensions"](d_model=32, d_ff=32, heads=2, layers=1)
    monkeypatch.setitem(main.__globals__, "TEACHER", small)
    monkeypatch.setattr(sys, "argv", ["scoring.py", *TINY.split(), "--repetitions", "1"])
    main()
    found = last_line(capsys)
    assert found["memory_ratio"] == 0.25
    assert found["times_faster"] == found["naive"]["cpu_seconds"] / found["ours"]["cpu_seconds"]
    # 2 × 2 completions of 3 tokens
    assert found["ours"]["rewards_per_cpu_second"] == pytest.approx(12 / found["ours"]["cpu_seconds"])


def test_a_teacher_that_scores_otherwise_is_noticed(monkeypatch):
    names = main_of("benchmarks/scoring").__globals__
    small = names["Dimensions"](d_model=32, d_ff=32, heads=2, layers=1)
    naive = names["naive_rewards"]
    monkeypatch.setitem(names, "naive_rewards", lambda *args: 1.1 * naive(*args))
    with pytest.raises(AssertionError, match="not close"):
        names["compare"](small, names["Shape"](5, 3, 2, 2, 40), 1)


def test_growth(monkeypatch):
    """Which steps are measured, each once, and what their line says."""
    names = main_of("benchmarks/growth").__globals__
    measured = []

    def stand_in(family, shape, teacher, steps):
        measured.append((shape.samples, shape.vocabulary, teacher.layers))
        values = {"cpu_seconds": 0.5 * teacher.layers, "extra_mib": 2.0 * shape.samples}
        return {"generate": values, "score": values, "update": values}

    monkeypatch.setitem(names, "measure_in_child", stand_in)
    sizes = {"samples": [1, 2, 4], "vocabulary": [40, 80], "teacher_layers": [8, 16]}
    found = names["grow"]("t5", names["Shape"](5, 3, 2, 2, 40), sizes, 1)
    assert measured == [(1, 40, 8), (2, 40, 8), (4, 40, 8), (2, 80, 8), (2, 40, 16)]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in names["table"](found).splitlines()[2:]]
    assert [line[1] for line in lines] == 3 * ["sampling", "scoring", "update"]
    assert lines[0][2:] == ["1: 4.00 s, 2 MiB · 2: 4.00 s, 4 MiB · 4: 4.00 s, 8 MiB", "0.00", "1.00"]
    assert lines[8][2:] == ["8: 4.00 s, 4 MiB · 16: 8.00 s, 4 MiB", "1.00", "0.00"]


@pytest.mark.slow(5)
@pytest.mark.parametrize("family", ["t5", "decoder_only"])
def test_a_step_whose_growth_is_measured(family, forked_measurements):
    """In processes of their own. 20,000 words more are in the update; twice as much, AdamW's moments, is not."""
    names = names_of("growth")
    small = names.Dimensions(d_model=32, d_ff=32, heads=2, layers=1)
    few, many = (
        names.measure_in_child(family, names.Shape(5, 40, 2, 2, vocabulary), small, 1) for vocabulary in (40, 20_000)
    )
    assert list(few) == ["generate", "score", "update"]
    assert all(phase["cpu_seconds"] > 0 for phase in few.values())
    # Gradients of the student's embedding and head: 2 · 20,000 · 256 float32 are 39 MiB. Scoring has slices of logits.
    assert 39 < many["update"]["extra_mib"] - few["update"]["extra_mib"] < 78
    assert many["score"]["extra_mib"] < 32


@pytest.mark.slow(1)
def test_memory_of_a_phase(tmp_path):
    """A process of its own, whose phases take 100 MiB, free it, take 50 more, and keep 30."""
    program = """
import json
from step_phases import PhaseMeter
meter = PhaseMeter()
meter.trims = True
def take(mib):
    return bytearray(b"x" * 2**20) * mib
meter.begin()
for step in range(2):
    with meter.phase("score"):
        freed = take(100)
        del freed
    kept = take(30)
    with meter.phase("generate"):
        freed = take(50)
        del freed
    del kept
    meter.finish_step()
print(json.dumps([meter.extra_mib, len(meter.steps)]))
"""
    place = str(ROOT / "recipes" / "benchmarks")
    (tmp_path / "phases.py").write_text(f"import sys; sys.path.insert(0, {place!r})\n{program}")
    printed = run_forked("tests.distributed.forked_script", tmp_path, [{}], str(tmp_path / "phases.py"))
    extra, steps = json.loads(printed.splitlines()[-1])
    assert steps == 2
    assert extra == pytest.approx({"score": 100, "generate": 50, "update": 30}, abs=8)


@pytest.mark.slow(2)
def test_memory_of_a_fresh_process(forked_measurements):
    """Naive scoring holds all logits and their log-softmax: 4 × 41 × 20,000 float32 are 12.5 MiB, twice."""
    names = names_of("scoring")
    small, shape = names.Dimensions(d_model=32, d_ff=32, heads=2, layers=1), names.Shape(5, 40, 2, 2, 20_000)
    naive, ours = (names.extra_mib_in_children(way, small, shape, processes=1) for way in ("naive", "ours"))
    assert naive > 1.5 * 12.5 > ours


@pytest.mark.slow
def test_a_dry_run_for_the_gpu(tmp_path, capsys):
    assert run(f"benchmarks/gpu --dry_run --steps 1 --results_dir {tmp_path}") == 0
    assert json.loads((tmp_path / "gpu.json").read_text()) == {"measured": False}
    assert "Not measured" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize("measured", [True, False])
def test_a_dry_run_leaves_measurements_alone(measured, tmp_path, monkeypatch):
    (tmp_path / "gpu.json").write_text(json.dumps({"measured": measured, "matmul_tflop_per_second": 600.0}))
    (tmp_path / "gpu.md").write_text("before")
    before = (tmp_path / "gpu.json").read_text()
    main = main_of("benchmarks/gpu")
    monkeypatch.setitem(main.__globals__, "measure", lambda *args, **kwargs: {})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry_run", "--results_dir", str(tmp_path)])
    main()
    assert ((tmp_path / "gpu.json").read_text() == before) == measured
    assert ((tmp_path / "gpu.md").read_text() == "before") == measured


def test_the_gpu_benchmarks_table():
    names = names_of("gpu")
    found = {
        "device": "A GPU",
        "date": "2000-01-31",
        "matmul_tflop_per_second": 612.4,
        "student": {
            "ours": {"tokens_per_second": 8123.6, "peak_gib": 11.14},
            "generate": {"tokens_per_second": 1907.0, "peak_gib": 23.46},
            "generate_static": {"tokens_per_second": 2345.1, "peak_gib": 22.0},
        },
        "teachers": {
            "t0_3b int8": {
                "weights_gib": 3.14,
                "scoring": {"tokens_per_second": 51234.4, "share_of_matmul_rate": 0.526, "peak_gib": 9.96},
                "ppo": {"seconds_per_step": 7.125, "peak_gib": 31.04},
            }
        },
    }
    head, _, rollouts, _, *table = names.as_markdown(found, names.Shape(256, 64, 128, 8, 32128)).splitlines()
    assert (
        head.startswith("A GPU; torch ") and "; 2000-01-31. 128 prompts of 256 tokens × 8 completions of 64." in head
    )
    assert head.endswith("Large bfloat16 products: 612 TFLOP/s.")
    assert "8124 tokens/s; plain `generate()` 1907, with its static cache 2345." in rollouts
    assert rollouts.endswith("Peak 11.1, 23.5 and 22.0 GiB.")
    assert [cell.strip() for cell in table[2].split("|")] == [
        "",
        *"t0_3b int8,3.1,51234,0.53,10.0,7.12,31.0".split(","),
        "",
    ]
    assert len({line.count("|") for line in table}) == 1 and len(table) == 3


def test_ways_of_sampling(monkeypatch, capsys):
    """The benchmark itself checks that each way gives completions of full length."""
    main = main_of("benchmarks/sampling")
    small = main.__globals__["STUDENT"].__class__(d_model=32, d_ff=32, heads=2, layers=1)
    monkeypatch.setitem(main.__globals__, "STUDENT", small)
    monkeypatch.setattr(sys, "argv", ["sampling.py", *TINY.split(), "--repetitions", "1"])
    main()
    found = last_line(capsys)
    seconds = found["cpu_seconds"]
    assert list(seconds) == ["ours", "generate", "generate_static"] and min(seconds.values()) > 0
    assert found["times_faster"]["generate_static"] == seconds["generate_static"] / seconds["ours"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would begin to measure")
def test_without_a_gpu_there_is_only_the_dry_run(capsys):
    assert run("benchmarks/gpu") == 2
    assert "--dry_run" in capsys.readouterr().err


# Losses over the whole vocabulary


def test_plain_and_sliced_losses_are_one():
    """The memory and time of two ways to the same loss and gradients, for every divergence and for all actions."""
    names = main_of("benchmarks/fused_divergence").__globals__
    names.update(V=30, D=8)
    assert len(names["LOSSES"]) == 7 and "all_actions" in names["LOSSES"]
    problem = names["Problem"](positions=5)
    values = set()
    for loss in names["LOSSES"]:
        found = []
        for max_elements in (0, 60):  # whole, and 2 positions at a time
            value = problem.gradients(loss, max_elements)
            found.append((value, problem.hidden_ND.grad.clone(), problem.weight_VD.grad.clone()))
        (plain, *plain_grads), (sliced, *sliced_grads) = found
        assert sliced == pytest.approx(plain, rel=1e-5)
        assert all(gradient.norm() > 1e-4 for gradient in plain_grads)
        torch.testing.assert_close(sliced_grads, plain_grads, rtol=1e-4, atol=1e-7)
        values.add(round(plain, 5))
    assert len(values) == 7, "each another loss"


@pytest.mark.parametrize(
    ("sliced_mib", "seconds", "met"), [(25, [13, 12, 14], True), (26, [13, 12, 14], False), (25, [14, 12, 14], False)]
)
def test_a_quarter_of_the_memory_and_13_tenths_of_the_time(sliced_mib, seconds, met):
    row = names_of("fused_divergence").compare("jsd", {0: 100, 4: sliced_mib}, {0: [10, 10, 9], 4: seconds}, 4)
    assert row["met"] is met
    assert row["memory_ratio"] == sliced_mib / 100 and row["time_ratio"] == sorted(seconds)[1] / 10
    assert row["time_ratio_per_repetition"] == [round(s / p, 3) for s, p in zip(seconds, [10, 10, 9], strict=True)]


def test_products_of_one_step_are_counted_by_phase_and_shape(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "recipes" / "benchmarks")
    import step_products
    from step_phases import PhaseMeter

    meter = PhaseMeter()
    profiled = step_products.ProfiledPhases(meter, step_number=1)
    meter.begin()
    for _ in range(3):  # of which the second counts
        for _ in range(2):
            with meter.phase("generate"):
                torch.randn(3, 5) @ torch.randn(5, 7)
        torch.randn(2, 3, 5) @ torch.randn(2, 5, 7)
        meter.finish_step()
    assert profiled.products["generate"] == {("aten::mm", ((3, 5), (5, 7))): 2}
    assert profiled.products["update"] == {("aten::bmm", ((2, 3, 5), (2, 5, 7))): 1}
    assert profiled.seconds["generate"]["aten::mm"] > 0 and "aten::bmm" not in profiled.seconds["generate"]


def test_where_the_time_goes_by_hand(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "recipes" / "benchmarks")
    import step_products

    others = {"aten::cat": 0.5, "aten::mul": 0.25}
    found = {"update": {"seconds": 5.0, "products": 4.0, "alone": 2.5, "large": 2.0, "others": others}}
    row = step_products.table(found).splitlines()[-1].strip("| ").split(" | ")
    assert row == ["update", "5.00", "4.00", "2.50", "2.00", "2.00", "2.50", "cat 10.0, mul 5.0"]
