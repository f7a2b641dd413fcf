"""`KDTrainer` on a cached teacher: the same run as with the teacher itself, and what it refuses."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.numpy import load_file, save_file

from rlkd_trl.errors import InputError
from rlkd_trl.prompts import PromptTemplate, PromptTemplates
from rlkd_trl.rewards import TeacherForcingReward
from rlkd_trl.teachers import Teacher, TeacherPanel, cache_writer
from rlkd_trl.teachers.cache import CachedPanel, TeacherCache, key_of, shard_file
from rlkd_trl.teachers.cache_writer import is_place_of_cache, remove_cache, targets_of, write_cache
from rlkd_trl.trainers.run_record import model_record
from tests.tiny_models import MODELS, word_tokenizer
from tests.trainers.tiny_runs import assert_same_weights, largest_difference, pairs, run

DATA = pairs(32)
ON_DATA = {"sequences": "data", "lmbda": 0.0, "beta": None, "data": DATA}
TEMPLATES = PromptTemplates([PromptTemplate("before", "w9 {{ source }}"), PromptTemplate("after", "{{ source }} w10")])


class CachedReward:
    """What `tiny_runs.run` takes the teachers of."""

    def __init__(self, panel):
        self.panel = panel


def panel_of(family: str, templates=None) -> TeacherPanel:
    seeds = (5,) if templates is None else (5, 6)
    teachers = [Teacher(MODELS[family](seed=seed), word_tokenizer()) for seed in seeds]
    weights = None if templates is None else [1.0, 3.0]
    return TeacherPanel(teachers, templates, teacher_weights=weights)


def cached(directory, panel, data=DATA, **settings) -> CachedPanel:
    settings = {
        "k": 0,
        "dtype": "float32",
        "temperature": 1.0,
        "ensemble": "probabilities",
        "max_completion_length": 6,
        "batch_size": 5,
        "rows_per_shard": 16,
        **settings,
    }
    teachers = {id(scorer.teacher): scorer.teacher for scorer in panel.scorers}.values()
    identities = [model_record(teacher.model) for teacher in teachers]
    write_cache(panel, list(data), directory, names=["tiny"] * len(identities), identities=identities, **settings)
    return CachedPanel(TeacherCache(directory), panel.templates)


CASES = {
    "word level": ("t5-tied", None, {"divergence": "forward_kl"}),
    "hinton": (
        "llama",
        None,
        {"divergence": "forward_kl", "distillation_temperature": 2.0, "alpha": 0.6, "num_generations": 4},
    ),
    "ensemble": ("glm", TEMPLATES, {"divergence": "jsd", "beta": 0.3, "ensemble": "logits"}),
    "reverse": ("t5-untied", None, {"divergence": "reverse_kl", "mask_truncated_completions": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_with_all_ids_it_trains_as_with_the_teacher(case, tmp_path):
    family, templates, settings = CASES[case]
    panel = panel_of(family, templates)
    settings = {**ON_DATA, "max_steps": 3, "optim": "sgd", "learning_rate": 0.5, **settings}
    of_cache = {
        "temperature": settings.get("distillation_temperature", 1.0),
        "ensemble": settings.get("ensemble", "probabilities"),
    }
    with_teacher = run("kd", tmp_path / "teacher", family=family, reward=CachedReward(panel), **settings)
    cache = cached(tmp_path / "cache", panel_of(family, templates), **of_cache)
    with_cache = run("kd", tmp_path / "cached", family=family, reward=CachedReward(cache), **settings)
    for ours, theirs in zip(with_cache.logs, with_teacher.logs, strict=True):
        for name in ("loss", "grad_norm", "divergence"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    assert_same_weights(with_cache.weights[-1], with_teacher.weights[-1], rtol=1e-4, atol=1e-5)
    assert largest_difference(with_teacher.weights[-1], with_teacher.weights[0]) > 1e-3


def test_fewer_ids_give_a_lower_loss_and_float16_rounds(tmp_path):
    """Divergence in nats of the first step, before anything is learnt: 5 of 25 ids miss some of it, 24 almost none."""
    divergences = {}
    for name, settings in {"all": {}, "24": {"k": 24}, "5": {"k": 5}, "half": {"dtype": "float16"}}.items():
        cache = cached(tmp_path / name, panel_of("llama"), **settings)
        recorder = run(
            "kd",
            tmp_path / f"of {name}",
            family="llama",
            reward=CachedReward(cache),
            max_steps=1,
            **{**ON_DATA, "divergence": "forward_kl"},
        )
        divergences[name] = recorder.logs[0]["divergence"]
    assert divergences["5"] < divergences["24"] - 1e-3
    assert divergences["24"] == pytest.approx(divergences["all"], rel=1e-3)
    assert divergences["half"] == pytest.approx(divergences["all"], rel=1e-2)
    assert divergences["half"] != divergences["all"]


def test_the_files_hold_the_teachers_distribution(tmp_path):
    """Of one target, read with plain forward passes in float64."""
    panel = cached(tmp_path, panel_of("llama"), k=4, temperature=2.0)
    row = DATA[3]
    tokenizer, model = word_tokenizer(), MODELS["llama"](seed=5)
    prompt = tokenizer(row["prompt"])["input_ids"]
    target = [*tokenizer(row["references"][0], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id][:6]
    ids, logps = panel.cache.read(panel.cache.place_of(key_of([row["prompt"]], target)))
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *target]])).logits[0, len(prompt) - 1 : -1].double() / 2
    forbidden = [0, 2, *range(27, logits.shape[1])]  # padding, unknown, sentinels, rows without a token
    logits[:, forbidden] = -torch.inf
    expected = logits.log_softmax(dim=-1)
    assert ids.shape == (len(target), 4) and logps.shape == (len(target), 5)
    assert torch.equal(ids, expected.topk(4).indices)
    torch.testing.assert_close(logps[:, :4].double(), expected.topk(4).values, rtol=1e-5, atol=1e-5)
    rest = expected.scatter(1, ids, -torch.inf).logsumexp(dim=-1)
    torch.testing.assert_close(logps[:, 4].double(), rest, rtol=1e-5, atol=1e-5)


def test_every_target_is_found_and_no_other(tmp_path):
    """Also by keys that end with a byte of 0, and those of which only the first half is the same."""
    data = list(pairs(300))
    panel = cached(tmp_path, panel_of("llama"), data, k=1, batch_size=64, rows_per_shard=100)
    tokenizer = word_tokenizer()
    targets = targets_of(data, panel.questions, tokenizer, [tokenizer.eos_token_id], max_completion_length=6)
    keys = [target.key for target in targets]
    assert any(key.endswith(b"\0") for key in keys)
    assert [panel.cache.place_of(key) for key in keys] == list(range(len(keys)))
    assert panel.cache.place_of(keys[7][:8] + keys[8][8:]) is None
    assert panel.cache.place_of(bytes(16)) is None and panel.cache.place_of(b"\xff" * 16) is None


@pytest.mark.parametrize(("k", "rows"), [(4, 5), (1, 16), (0, 1)])
def test_a_file_is_as_large_as_memory_has_room_for(k, rows, tmp_path, monkeypatch):
    """A token of 4 ids takes 4 · 2 + 5 · 4 = 28 bytes, the longest target has 6: 1000 bytes hold 5 targets of 168.

    One id takes 2 + 2 · 4 = 10 bytes: 16 targets of 60 are 960. All 24 ids of one target are 888.
    """
    monkeypatch.setattr(cache_writer, "_SHARD_BYTES", 1000)
    assert cached(tmp_path, panel_of("llama"), k=k, rows_per_shard=None).cache.header.rows_per_shard == rows


def test_a_stopped_writer_goes_on_and_leaves_whole_shards_alone(tmp_path, monkeypatch):
    panel = panel_of("llama")
    whole = cached(tmp_path / "whole", panel)
    shards = [shard_file(tmp_path / "whole", n).read_bytes() for n in range(whole.cache.header.num_shards)]
    assert len(shards) > 2
    passes = []
    states = panel.states

    def stopped(*args):
        passes.append(1)
        if len(passes) == 6:  # in the second shard: four of them make the first
            raise KeyboardInterrupt
        return states(*args)

    monkeypatch.setattr(panel, "states", stopped)
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "stopped", panel)
    assert shard_file(tmp_path / "stopped", 0).read_bytes() == shards[0]
    assert not shard_file(tmp_path / "stopped", 1).exists()
    with pytest.raises(InputError, match=f"not complete: {len(shards) - 1} of its {len(shards)} shards are missing"):
        TeacherCache(tmp_path / "stopped")
    first = shard_file(tmp_path / "stopped", 0).stat()
    (tmp_path / "stopped" / "shard-00001.safetensors.part").write_bytes(b"torn")
    cached(tmp_path / "stopped", panel)
    assert [shard_file(tmp_path / "stopped", n).read_bytes() for n in range(len(shards))] == shards
    after = shard_file(tmp_path / "stopped", 0).stat()
    assert (after.st_mtime_ns, after.st_ino) == (first.st_mtime_ns, first.st_ino)


def test_another_cache_is_not_mixed_into_a_directory(tmp_path):
    cached(tmp_path, panel_of("llama"), k=3)
    with pytest.raises(InputError, match="is a cache of something else: k is 3 and would be 25"):
        cached(tmp_path, panel_of("llama"))
    with pytest.raises(InputError, match="is a cache of something else: teachers is"):
        cached(tmp_path, TeacherPanel([Teacher(MODELS["llama"](seed=8), word_tokenizer())]), k=3)


def test_a_shard_of_another_cache_is_not_read_and_written_anew(tmp_path):
    """Of the same targets and ids, at another temperature."""
    panel = cached(tmp_path / "2", panel_of("llama"), k=3, temperature=2.0)
    cached(tmp_path / "1", panel_of("llama"), k=3)
    file = shard_file(tmp_path / "2", 1)
    sound = file.read_bytes()
    file.write_bytes(shard_file(tmp_path / "1", 1).read_bytes())
    with pytest.raises(InputError, match=r"shard-00001\.safetensors is of another cache than cache\.json beside it"):
        TeacherCache(tmp_path / "2")
    cached(tmp_path / "2", panel_of("llama"), k=3, temperature=2.0)
    assert file.read_bytes() == sound and panel.cache.header.num_shards > 1


def test_what_a_kill_leaves_of_a_beginning_or_a_deletion_is_gone_on_from(tmp_path, monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    teacher = panel_of("llama")
    config = teacher.scorers[0].teacher.model.config
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(type(config), "save_pretrained", killed)  # after the tokenizer's
        cached(tmp_path, teacher)
    assert {file.name for file in tmp_path.iterdir()} == {"cache.json.part", "tokenizer"}
    assert is_place_of_cache(tmp_path)
    panel = cached(tmp_path, teacher)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("shutil.rmtree", killed)
        remove_cache(tmp_path)
    assert is_place_of_cache(tmp_path)
    assert cached(tmp_path, teacher).cache.header == panel.cache.header


def test_no_files_but_a_caches_are_deleted(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "cache.json").write_text('{"entries": []}')
    assert not is_place_of_cache(tmp_path)
    (tmp_path / "cache.json").unlink()
    assert not is_place_of_cache(tmp_path)
    cached(tmp_path, panel_of("llama"))
    assert is_place_of_cache(tmp_path)
    remove_cache(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    """The bytes of ids and log-probabilities are those of the arrays in the files."""
    whole = cached(tmp_path / "whole", panel_of("llama"), k=3)
    files = [shard_file(tmp_path / "whole", number) for number in range(whole.cache.header.num_shards)]
    needed = sum(load_file(file)[name].nbytes for file in files for name in ("ids", "logps"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=needed - 1))
    with pytest.raises(InputError, match=rf"take {needed:,} bytes more in .*, where {needed - 1:,} are free: keep"):
        cached(tmp_path / "cache", panel_of("llama"), k=3)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=needed))
    cached(tmp_path / "cache", panel_of("llama"), k=3)


def test_damage_is_noticed_where_it_is_read(tmp_path):
    panel = cached(tmp_path, panel_of("llama"), k=3)
    file = shard_file(tmp_path, 1)
    arrays = load_file(file)
    arrays["logps"][-1, 0] -= 0.125
    save_file(arrays, file, metadata={"header": panel.cache.header.digest})
    damaged = CachedPanel(TeacherCache(tmp_path))
    first, last = 16, 16 + len(arrays["ends"]) - 1
    assert torch.equal(damaged.cache.read(first)[1], panel.cache.read(first)[1])
    with pytest.raises(InputError, match=r"shard-00001\.safetensors is damaged: delete it, and run the command again"):
        damaged.cache.read(last)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"shard-00001\.safetensors is damaged"):
        TeacherCache(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lmbda": 0.5}, "lmbda = 0.5: what the teacher says about the student's own samples cannot be in a cache"),
        ({"sequences": "teacher"}, "sequences = 'teacher': a cache cannot write new samples"),
        ({"alpha": 0.0, "divergence": "forward_kl"}, "alpha = 0 reads no teacher"),
        ({"distillation_temperature": 2.0}, "distillation_temperature = 2.0, and the cache was made at 1.0"),
        ({"max_completion_length": 7}, "max_completion_length = 7, and the cache has targets of up to 6 tokens"),
        ({"data": pairs(32, seed=9)}, "is not in the teacher cache"),
        ({"metric_for_best_model": "eval_reward"}, "needs a teacher that reads the student's outputs"),
    ],
)
def test_what_a_cache_does_not_hold_is_refused(settings, message, tmp_path):
    cache = cached(tmp_path / "cache", panel_of("llama"))
    with pytest.raises(InputError, match=message):
        run("kd", tmp_path, family="llama", reward=CachedReward(cache), **{**ON_DATA, "divergence": "tvd", **settings})


def test_only_kd_takes_a_cache(tmp_path):
    cache = cached(tmp_path / "cache", panel_of("llama"))
    with pytest.raises(InputError, match="AllActionsKDTrainer reads the teacher's whole distribution"):
        run("all-actions", tmp_path, family="llama", reward=CachedReward(cache))
    with pytest.raises(InputError, match="tells about fixed targets only, not about samples"):
        run("rloo-token", tmp_path, family="llama", reward=TeacherForcingReward(cache))


def test_other_templates_and_other_special_tokens_are_refused(tmp_path):
    panel = cached(tmp_path / "cache", panel_of("llama", TEMPLATES))
    with pytest.raises(InputError, match=r"made with the templates before, after, and here there are none"):
        CachedPanel(panel.cache)
    file = tmp_path / "cache" / "cache.json"
    other = CachedPanel(TeacherCache(tmp_path / "cache"), TEMPLATES)
    other.cache.header = replace(panel.cache.header, forbidden=[*panel.cache.header.forbidden, 9], weights=[1.0])
    with pytest.raises(InputError, match="may not write the same tokens; of 1 only one of them may write: 'w9'"):
        run("kd", tmp_path, family="llama", reward=CachedReward(other), **{**ON_DATA, "divergence": "tvd"})
    other.cache.header = replace(panel.cache.header, eos_ids=[1, 9], weights=[1.0])
    with pytest.raises(InputError, match=r"The student's texts end with </s>, and those of the .* with </s>, w9, so"):
        run("kd", tmp_path, family="llama", reward=CachedReward(other), **{**ON_DATA, "divergence": "tvd"})
    file.write_text(file.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(InputError, match="has format 1, and this version reads 2"):
        TeacherCache(tmp_path / "cache")
    file.write_text("[]")
    with pytest.raises(InputError, match="is not the header of a teacher cache"):
        TeacherCache(tmp_path / "cache")
