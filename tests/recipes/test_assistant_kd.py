"""assistant_kd.py as a user runs it: which model teaches which, what is left, that a finished hop is not run again."""

import json
import shutil
import time
from types import SimpleNamespace

import pytest
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from rlkd_trl.commands import demo
from rlkd_trl.commands.assistants import Chain
from rlkd_trl.commands.comparison import cells
from rlkd_trl.commands.comparison.checks import TrainerConfigs
from rlkd_trl.commands.settings import parse_settings
from rlkd_trl.errors import InputError
from tests.models.tokenizers_of_all_kinds import character_tokenizer
from tests.recipes.command_lines import ROOT, run, word_rows, write_csv
from tests.recipes.forks import Fork, fork_recipes

TINY = "--common per_device_train_batch_size=8 num_generations=1 max_completion_length=6 save_strategy=no"


@pytest.fixture
def place(checkpoints, tmp_path, monkeypatch):
    pair = checkpoints["t5-untied"]
    shutil.copytree(pair.student, tmp_path / "small")
    config = AutoConfig.from_pretrained(pair.student)
    config.num_layers = config.num_decoder_layers = 6
    config.d_ff *= 8
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "large")
    AutoTokenizer.from_pretrained(pair.student).save_pretrained(tmp_path / "large")
    write_csv(tmp_path / "train.csv", word_rows(30))
    write_csv(tmp_path / "test.csv", word_rows(8, seed=1))
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMAND = (
    "assistant_kd --teacher large --student small --dataset train.csv --eval_dataset test.csv --source_column mr "
    f"--target_column ref {TINY} --output_dir out"
)


def chain_of(flags: str, monkeypatch) -> Chain:
    from rlkd_trl.commands.assistants import ChainSettings

    monkeypatch.setattr("sys.argv", [*COMMAND.split(), *flags.split()])
    settings = parse_settings(ChainSettings, description="", recipe="assistant_kd")
    return Chain.of(settings, ROOT / "recipes")


def test_who_teaches_whom(place, monkeypatch):
    last = chain_of("--num_assistants 2 --max_steps 3 5 7 --methods word_kd gkd ppo", monkeypatch)
    assert [last.teachers(hop) for hop in range(3)] == [["large"], ["out/assistant1"], ["out/assistant2"]]
    assert last.begins == ["out/begin1", "out/begin2", "small"]
    assert [last.cell(hop).method.name for hop in range(3)] == ["word_kd", "gkd", "ppo"]
    assert "--max_steps=5" in last.flags(1) and "--learning_rate=0.0005" in last.flags(2)
    dense = chain_of("--num_assistants 2 --dense", monkeypatch)
    assert [len(dense.teachers(hop)) for hop in range(3)] == [1, 2, 3]
    assert dense.teachers(2) == ["large", "out/assistant1", "out/assistant2"]


def test_only_the_teacher_is_asked_through_its_templates(place, monkeypatch):
    asked = ["--template", "w3 {{ source }}"]
    chain = chain_of("--student_template w4{{source}}", monkeypatch)
    chain.settings.prompts.template = asked[1]
    assert asked[1] in chain.flags(0) and asked[1] not in chain.flags(1)
    assert "w4{{source}}" in chain.flags(0) and "w4{{source}}" in chain.flags(1)


def test_only_the_teacher_is_kept_and_spoken_to_as_its_flags_say(place, monkeypatch):
    """Assistants are spoken to as the student is, in all hops after the first."""
    of_teacher = "--teacher_system_prompt expert --teacher_quantization nf4 --teacher_max_prompt_length 90"
    chain = chain_of(f"{of_teacher} --student_system_prompt brief --teacher_batch_tokens 512", monkeypatch)
    first, second = (" ".join(chain.flags(hop)) for hop in range(2))
    assert of_teacher.split()[1] in first and "nf4" in first and "--teacher_max_prompt_length 90" in first
    assert "--teacher_system_prompt brief" in second and "--student_system_prompt brief" in second
    assert "nf4" not in second and "max_prompt_length" not in second and "--teacher_batch_tokens 512" in second


def test_a_killed_hop_finds_checkpoints(place, monkeypatch):
    """400 steps would end before the first of TrainingArguments' 500; what is given holds."""
    chain = chain_of("--max_steps 400 3", monkeypatch)
    assert "--save_steps=100" in chain.flags(0) and "--save_steps=1" in chain.flags(1)
    chain.settings.chain.common.append("save_steps=7")
    assert chain.flags(0).index("--save_steps=7") > chain.flags(0).index("--save_steps=100")


def test_the_student_alone_is_sent_to_the_hub(place, monkeypatch):
    chain = chain_of(f"{TINY} push_to_hub=True hub-model-id=owner/student", monkeypatch)
    of_hub = [[flag for flag in chain.flags(hop) if "hub" in flag] for hop in range(2)]
    assert of_hub == [[], ["--push_to_hub=True", "--hub-model-id=owner/student"]]


def test_no_preset_sends_every_assistant_to_the_hub(place, monkeypatch):
    (place / "kd").mkdir(exist_ok=True)
    (place / "kd/pushed.yaml").write_text("push_to_hub: true\n")
    message = r"The preset .*pushed.yaml sets push_to_hub, .* give --common push_to_hub=True, which sends the last"
    with pytest.raises(InputError, match=message):
        chain_of("--methods kd/pushed.yaml", monkeypatch)


@pytest.mark.slow(0.7)
def test_each_hop_is_checked_with_its_own_teachers(place, monkeypatch):
    """A teacher with another tokenizer is asked in the first hop alone; weights by losses begin with two teachers."""
    (place / "ppo_kd").mkdir()
    (place / "ppo_kd/aligned.yaml").write_text("align_tokenizers: true\n")
    shutil.copytree(place / "large", place / "other")
    character_tokenizer().save_pretrained(place / "other")
    common = TINY.replace("save_strategy=no", "teacher_weighting=per_example")
    configs = TrainerConfigs(
        ppo_kd="rlkd_trl.trainers.config:PPOKDConfig", kd="rlkd_trl.trainers.full_vocabulary_config:KDConfig"
    )
    chain_of("--teacher other --methods ppo_kd/aligned.yaml word_kd", monkeypatch).check(configs)
    chain = chain_of(f"--dense {common}", monkeypatch)
    assert "--teacher_weighting=per_example" not in chain.flags(0)
    assert "--teacher_weighting=per_example" in chain.flags(1)
    chain.check(configs)
    with pytest.raises(InputError, match=r"Hop 2 \(word_kd\): --teacher_weights has 1 weights for 2 teachers"):
        chain_of(f"--dense {TINY} teacher_weights=1", monkeypatch).check(configs)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--num_assistants 0", "--num_assistants 0 is out of range"),
        ("--max_steps 1 2 3", "--max_steps has 3 values for 2 hops: give one for each, or one"),
        ("--methods nothing", "--methods nothing: no such method"),
        ("--methods pkd", "encoder_kd is none of the recipes of a hop"),
        ("--common logging_steps", "--common logging_steps is not of the form name=value"),
        ("--common hub_token=secret", "--common sets hub_token, which would stand in every run's record"),
        ("--common hub-token=secret", "--common sets hub_token, which would stand in every run's record"),
        ("--common teacher=small max_steps=1", "--common sets max_steps, which the chain sets for each hop"),
        ("--common student=large", "--common sets student, which the chain sets for each hop"),
        ("--common teacher_server=http://x", "--common sets teacher_server, which the chain sets for each hop"),
        ("--common losses=1", "Hop 1 (word_kd):"),
        ("--assistants nowhere", "Could not load the model config of 'nowhere' (no directory here"),
        ("--assistants large small --num_assistants 2", "--num_assistants makes new assistants"),
        ("--teacher small --student large", "between a teacher and a smaller student"),
        ("--teacher large small", "2 teachers: a chain begins with one"),
        ("--dense --template {{source}}", "--dense with --template"),
        ("--dense --teacher_system_prompt expert", "--dense with --teacher_system_prompt"),
        ("--dense --student_system_prompt brief", "--dense with --teacher_system_prompt"),
        ("--dense --teacher_max_prompt_length 9", "--dense with --teacher_max_prompt_length"),
        ("--smoke", "--smoke brings its own data and models: leave out --dataset and --teacher and --student"),
        ("--source_column text", "`--source_column text` is not in the data"),
        ("--learning_rates 0", "--learning_rates 0.0 is out of range"),
        ("--teacher nowhere", "Could not load the model config of 'nowhere' (no directory here"),
    ],
)
def test_mistakes_are_refused_before_anything_is_made(flags, message, place, capfd):
    assert run(f"{COMMAND} {flags}") == 2
    assert message in capfd.readouterr().err
    assert not list(place.glob("out/*/*"))


@pytest.mark.slow
def test_a_chain_is_run_once(place, capfd, monkeypatch):
    """The real command: with DGKD's teachers, then again; then on after its last hop was taken away."""
    fork_recipes(monkeypatch)
    command = f"{COMMAND} --max_steps 2 --dense --num_assistants 1"
    assert run(command) == 0
    printed = capfd.readouterr().out
    assert "out/assistant1: done" in printed and "out/student: done" in printed
    assert (place / "out/chain.md").read_text() in printed
    hops = json.loads((place / "out/chain.json").read_text())["hops"]
    assert [hop["teachers"] for hop in hops] == [["large"], ["large", "out/assistant1"]]
    assert [hop["cost"]["optimizer_steps"] for hop in hops] == [2, 2]
    counts = [
        AutoModelForSeq2SeqLM.from_pretrained(place / name).num_parameters()
        for name in ("large", "out/assistant1", "out/student")
    ]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == 3

    assert run(command) == 0
    assert "done" not in capfd.readouterr().out
    shutil.rmtree(place / "out/student")
    before = (place / "out/assistant1/model.safetensors").stat().st_mtime_ns
    assert run(command) == 0
    printed = capfd.readouterr().out
    assert "out/student: done" in printed and "assistant1: done" not in printed
    assert (place / "out/assistant1/model.safetensors").stat().st_mtime_ns == before
    assert run(f"{command} --seed 1") == 2
    assert "out/assistant1 holds the results of another command" in capfd.readouterr().err


@pytest.mark.slow
def test_a_killed_hop_goes_on_from_its_checkpoint(place, monkeypatch):
    started = []

    class KilledOnce(Fork):
        def __init__(self, words, **kwargs):
            started.append(words)
            super().__init__(words, **kwargs)

        def wait(self):
            while len(started) == 1 and not self.has_ended():
                if (place / "out/assistant1/checkpoint-10").is_dir():
                    self.kill()
                    break
                time.sleep(0.01)
            return super().wait()

    monkeypatch.setattr(cells, "subprocess", SimpleNamespace(Popen=KilledOnce))
    command = f"{COMMAND.replace(' save_strategy=no', '')} --max_steps 40 2"
    assert run(command) == 1 and len(started) == 1
    assert run(command) == 0
    assert len(started) == 3 and "--resume" in started[1] and "--resume" not in started[2]


@pytest.mark.slow(4)
def test_on_the_demo(tmp_path, monkeypatch):
    fork_recipes(monkeypatch)
    monkeypatch.setattr(demo, "SMOKE_STEPS", {"teacher_steps": 5, "student_steps": 5})
    for split, size in {"train": 100, "validation": 6, "test": 8}.items():
        monkeypatch.setitem(demo.SPLIT_SIZES, split, size)
    assert run(f"assistant_kd --smoke --output_dir {tmp_path / 'out'}") == 0
    assert "| assistant1 | word_kd | 4 |" in (tmp_path / "out" / "chain.md").read_text()
