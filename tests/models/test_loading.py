"""Checkpoints from a directory or the Hub, and one line of explanation where that fails."""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from rlkd_trl.errors import InputError
from rlkd_trl.models.encoders import load_encoder
from rlkd_trl.models.generation_config import set_trained_generation_config
from rlkd_trl.models.loading import load_model, load_tokenizer, require_checkpoint
from rlkd_trl.models.prompts import prompt_token_ids, tokenize_prompts
from rlkd_trl.models.vocabulary import eos_token_ids, forbidden_ids_of
from tests.tiny_models import EOS, MODELS, PADDED_VOCAB, VOCAB, tiny_llama, tiny_t5, word_tokenizer


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One directory per family."""
    directories = {}
    for name, build in MODELS.items():
        directories[name] = tmp_path_factory.mktemp(name)
        build().save_pretrained(directories[name])
        word_tokenizer().save_pretrained(directories[name])
    return directories


@pytest.mark.parametrize("name", list(MODELS))
def test_what_was_saved_is_loaded(checkpoints, name):
    model, saved = load_model(str(checkpoints[name])), MODELS[name]()
    assert type(model) is type(saved)
    for key, value in saved.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    assert load_tokenizer(str(checkpoints[name])).get_vocab() == word_tokenizer().get_vocab()


@pytest.mark.parametrize("written_by", ["this transformers", "transformers 4"])
def test_a_t5_whose_head_is_not_its_embedding(tmp_path, written_by):
    """T0's files, of which the config only says `tie_word_embeddings: false`, and our own copy of it."""
    saved = tiny_t5(tied=False)
    saved.save_pretrained(tmp_path)
    if written_by == "transformers 4":
        config = json.loads((tmp_path / "config.json").read_text())
        config.pop("scale_decoder_outputs", None)
        (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    model = load_model(str(tmp_path))
    assert torch.equal(model.lm_head.weight, saved.lm_head.weight)
    assert torch.equal(model.shared.weight, saved.shared.weight)
    ids = torch.tensor([[3, 4]])
    assert torch.equal(
        model(input_ids=ids, decoder_input_ids=ids).logits, saved(input_ids=ids, decoder_input_ids=ids).logits
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype(checkpoints, dtype):
    assert {p.dtype for p in load_model(str(checkpoints["t5-untied"]), dtype=dtype).parameters()} == {
        getattr(torch, dtype)
    }


def test_dtype_auto_is_the_checkpoints_own(tmp_path):
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(str(tmp_path), dtype="auto").dtype == torch.bfloat16
    assert load_model(str(tmp_path)).dtype == torch.float32


def test_float16_is_for_other_models_than_t5(checkpoints):
    assert load_model(str(checkpoints["llama"]), dtype="float16").dtype == torch.float16
    with pytest.raises(InputError, match="overflow in float16"):
        load_model(str(checkpoints["t5-tied"]), dtype="float16")


@pytest.mark.parametrize("config_says", [True, False])
def test_a_t5_checkpoint_in_float16_does_not_slip_through_auto(tmp_path, config_says):
    tiny_t5(tied=True).half().save_pretrained(tmp_path)
    if not config_says:
        config = json.loads((tmp_path / "config.json").read_text())
        config.pop("dtype")
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="float16"):
        load_model(str(tmp_path), dtype="auto")


def test_unknown_dtype_before_anything_is_read():
    with pytest.raises(InputError, match=r"'fp32'.*float32"):
        load_model("/nowhere", dtype="fp32")


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "../nowhere", "a/b/c"])
def test_a_missing_directory(load, name):
    with pytest.raises(InputError, match="is not a directory") as caught:
        load(name)
    assert name in str(caught.value)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_directory_without_config(load, tmp_path):
    with pytest.raises(InputError, match=r"without config\.json"):
        load(str(tmp_path))


def test_a_file_is_not_a_checkpoint(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(InputError, match="is not a directory"):
        load_model(str(file))


def test_the_flag_is_named():
    with pytest.raises(InputError, match=r"`--teacher \./nowhere`"):
        require_checkpoint("--teacher", "./nowhere")


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_name_that_may_be_a_misspelt_directory(load, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"'runs/taecher' \(no directory here, so taken for a Hub id\)"):
        load("runs/taecher")


def _without_weights(path):
    (path / "model.safetensors").unlink()


def _half_the_weights(path):
    """An interrupted copy."""
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _half_a_pickle(path):
    (path / "model.safetensors").unlink()
    torch.save(tiny_llama().state_dict(), path / "pytorch_model.bin")
    content = (path / "pytorch_model.bin").read_bytes()
    (path / "pytorch_model.bin").write_bytes(content[: len(content) // 2])


def _other_shapes(path):
    tiny_llama(hidden_size=32).save_pretrained(path / "other")
    (path / "other" / "model.safetensors").rename(path / "model.safetensors")


def _bad_config(path):
    (path / "config.json").write_text('{"model_type": ')


def _unknown_type(path):
    (path / "config.json").write_text('{"model_type": "abacus"}')


@pytest.mark.parametrize(
    "damage",
    [_without_weights, _bad_config, _unknown_type, _half_the_weights, _half_a_pickle, _other_shapes],
)
def test_damaged_checkpoints_are_explained(tmp_path, damage):
    tiny_llama().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError) as caught:
        load_model(str(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("left", [[], ["tokenizer_config.json"]])
def test_a_checkpoint_without_tokenizer(tmp_path, left):
    """transformers would invent a T5 tokenizer of 104 tokens."""
    tiny_t5(tied=True).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path / "tokenizer")
    for name in left:
        (tmp_path / "tokenizer" / name).rename(tmp_path / name)
    with pytest.raises(InputError, match="tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_files_of_its_own(tmp_path):
    """ByT5's tokens are bytes."""
    from transformers import ByT5Tokenizer

    tiny_t5(tied=True).save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))("a")["input_ids"] == [ord("a") + 3, 1]


def test_a_tokenizer_without_pad_token_pads_with_eos(tmp_path):
    """As GPT-2's and Llama's."""
    tiny_llama().save_pretrained(tmp_path)
    tokenizer = word_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token_id == tokenizer.eos_token_id


# A repository on the Hub, played by a server on this machine.


class _Hub(http.server.BaseHTTPRequestHandler):
    """The Hub's file endpoints for one repository: revision "main" is empty, revision "v2" holds the files."""

    repository, commit = "someone/tiny-teacher", "c" * 40
    directory, served = None, []

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def log_message(self, *_):
        pass

    def _answer(self, *, body):
        path = self.path.split("?")[0]
        prefixes = [f"/{self.repository}/resolve/{revision}/" for revision in ("v2", self.commit)]
        name = next((path.removeprefix(prefix) for prefix in prefixes if path.startswith(prefix)), None)
        file = None if name is None else self.directory / name
        listing = path in (f"/api/models/{self.repository}", f"/api/models/{self.repository}/revision/v2")
        if file is not None and file.is_file():
            content, status = file.read_bytes(), 200
            self.served.append(name)
        elif listing:
            names = sorted(p.name for p in self.directory.iterdir())
            content = json.dumps(
                {"id": self.repository, "sha": self.commit, "siblings": [{"rfilename": n} for n in names], "tags": []}
            ).encode()
            status = 200
        else:
            content, status = b"{}", 404
        self.send_response(status)
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("Content-Length", str(len(content)))
        if status == 200:
            self.send_header("ETag", f'"{hash(content) & 0xFFFFFFFF:x}"')
        else:
            known = path.startswith((f"/{self.repository}/resolve/", f"/api/models/{self.repository}/tree/v2/"))
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
        self.end_headers()
        if body:
            self.wfile.write(content)


_LOAD_FROM_HUB = """
import json, sys, torch
from rlkd_trl.errors import InputError
from rlkd_trl.teachers import Teacher
torch.set_num_threads(1)
teacher = Teacher.from_pretrained("someone/tiny-teacher", revision="v2")
ids = torch.tensor([[3, 4, 1]])
scores = teacher.score(["w5 w6"], torch.tensor([0]), ids, torch.ones_like(ids).bool(), torch.tensor([True]))
try:
    Teacher.from_pretrained("someone/not-there")
except InputError as error:
    missing = str(error)
print(json.dumps({"chosen": scores.chosen[0].tolist(), "missing": missing}))
"""


@pytest.mark.slow
def test_a_hub_id_and_revision(checkpoints, tmp_path):
    """In a process of its own, since huggingface_hub reads its address when it is imported."""
    _Hub.directory = checkpoints["t5-tied"]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **{k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
    }
    try:
        result = subprocess.run(
            [sys.executable, "-c", _LOAD_FROM_HUB], env=environment, capture_output=True, text=True, timeout=300
        )
    finally:
        server.shutdown()
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout.splitlines()[-1])
    logits = MODELS["t5-tied"]()(
        input_ids=torch.tensor([[5, 6, 1]]), decoder_input_ids=torch.tensor([[0, 3, 4]])
    ).logits[0]
    torch.testing.assert_close(torch.tensor(answer["chosen"]), logits[range(3), [3, 4, 1]].detach())
    assert "model.safetensors" in _Hub.served and "someone/not-there" in answer["missing"]


@pytest.mark.parametrize("side, expected", [("right", [[3, 4, 1], [5, 1, 0]]), ("left", [[3, 4, 1], [0, 5, 1]])])
def test_prompts_are_padded_on_the_side_that_was_asked_for(tokenizer, side, expected):
    ids_PS, mask_PS = tokenize_prompts(tokenizer, ["w3 w4", "w5"], padding_side=side)
    assert ids_PS.tolist() == expected
    assert mask_PS.tolist() == [[int(i != 0) for i in ids] for ids in expected]


def test_prompts_as_ragged_lists_and_cut(tokenizer):
    # </s> is one of the tokens; a cut prompt keeps it, as T5's encoder expects.
    assert prompt_token_ids(tokenizer, ["w3 w4 w5", "w6"], max_length=3) == [[3, 4, 1], [6, 1]]


def test_a_pad_token_inside_a_prompt_is_not_masked(tokenizer):
    """The mask comes from the lengths and not from the ids."""
    _, mask_PS = tokenize_prompts(tokenizer, ["w3 <pad> w4", "w5"], padding_side="right")
    assert mask_PS.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_a_tokenizer_that_does_not_list_the_mask_among_its_outputs():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer().backend_tokenizer, pad_token="<pad>", model_input_names=["input_ids"]
    )
    _, mask_PS = tokenize_prompts(tokenizer, ["w3 w4", "w5"], padding_side="left")
    assert mask_PS.tolist() == [[1, 1, 1], [0, 1, 1]]


def test_a_prompt_without_tokens_is_named():
    with pytest.raises(InputError, match="The prompt ' ' has no tokens"):
        tokenize_prompts(word_tokenizer(append_eos=False), ["w3", " "], padding_side="left")


def test_settings_of_a_generation_config_that_are_not_used_are_named(tmp_path, capsys):
    model = tiny_t5(tied=True)
    config = model.generation_config
    config.repetition_penalty, config.no_repeat_ngram_size, config.bad_words_ids = 1.3, 1, [[5]]
    config.forced_eos_token_id, config.encoder_no_repeat_ngram_size = (
        EOS,
        1,
    )  # each of a value that is neutral in another
    config.min_length, config.guidance_scale = 0, 1.0
    model.save_pretrained(tmp_path)
    load_model(str(tmp_path))
    *named, last = capsys.readouterr().out.strip().rpartition("not used: ")[2].split(", ")
    assert {*named, last} == {
        *("repetition_penalty = 1.3", "no_repeat_ngram_size = 1", "encoder_no_repeat_ngram_size = 1"),
        "bad_words_ids = [[5]]",
        f"forced_eos_token_id = {EOS}.",
    }
    set_trained_generation_config(model, word_tokenizer(), max_completion_length=8)
    model.save_pretrained(tmp_path)
    load_model(str(tmp_path))
    assert "not used" not in capsys.readouterr().out


def test_a_small_model_with_the_eos_of_a_large_vocabulary(tmp_path):
    """GPT-2's default: it is never sampled, and the tokenizer's EOS ends completions."""
    sizes = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert eos_token_ids(model, word_tokenizer()) == [50256, EOS]
    assert not forbidden_ids_of(model, word_tokenizer())[EOS]


def test_a_token_that_the_decoder_cannot_read_is_refused_in_the_config_too(tmp_path):
    """It is read there if the generation config has none."""
    tiny_t5(tied=True).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "decoder_start_token_id": PADDED_VOCAB}))
    (tmp_path / "generation_config.json").write_text("{}")
    with pytest.raises(
        InputError, match=f"has decoder_start_token_id = {PADDED_VOCAB}: .* from 0 to {PADDED_VOCAB - 1}"
    ):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    "of_config, of_generation, message",
    [
        (
            {"decoder_start_token_id": None, "bos_token_id": None},
            {},
            "names no token that its decoder begins with: set",
        ),
        (
            {},
            {"forced_bos_token_id": [7]},
            r"has forced_bos_token_id = \[7\]: the model's token ids are whole numbers",
        ),
    ],
)
def test_a_decoder_that_has_nothing_to_begin_with_is_refused(of_config, of_generation, message, tmp_path):
    tiny_t5(tied=True).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **of_config}))
    (tmp_path / "generation_config.json").write_text(json.dumps(of_generation))
    with pytest.raises(InputError, match=message):
        load_model(str(tmp_path))


def without(directory, destination, *parts: str):
    """A copy of a checkpoint that lacks the weights whose names contain any of `parts`."""
    shutil.copytree(directory, destination)
    weights = load_file(destination / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not any(part in name for part in parts)}
    assert 0 < len(kept) < len(weights)
    save_file(kept, destination / "model.safetensors", metadata={"format": "pt"})
    return str(destination)


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize(
    ("name", "part", "named"),
    [
        ("t5-tied", "decoder.block.1.", "decoder.block.1.layer.0"),
        ("t5-tied", "shared", "shared.weight"),
        ("t5-untied", "encoder.block.0.", "encoder.block.0.layer.0"),
        ("t5-untied", "shared", "shared.weight"),  # transformers would take the head for the embeddings
        ("llama", "layers.1.", "model.layers.1."),
        ("llama", "embed_tokens", "model.embed_tokens.weight"),
        ("llama", "lm_head", "lm_head.weight"),
        ("llama", "model.norm", "model.norm.weight"),
    ],
)
def test_an_incomplete_checkpoint_is_refused(checkpoints, name, part, named, quantization, tmp_path):
    if quantization == "int8":
        pytest.importorskip("bitsandbytes")
    directory = without(checkpoints[name], tmp_path / "copy", part)
    with pytest.raises(InputError, match=rf"is incomplete: \d+ of its weights.*{re.escape(named)}"):
        load_model(directory, quantization=quantization)


@pytest.mark.parametrize(
    ("name", "setting", "layers"),
    [
        ("t5-tied", "num_layers", "encoder.block"),
        ("t5-untied", "num_decoder_layers", "decoder.block"),
        ("llama", "num_hidden_layers", "model.layers"),
        ("bert", "num_hidden_layers", "bert.encoder.layer"),
    ],
)
def test_a_config_of_fewer_layers_than_there_are_weights_of_is_refused(checkpoints, name, setting, layers, tmp_path):
    """transformers leaves the others out, with a report that is easily overlooked: another model than is meant."""
    copy = tmp_path / "copy"
    if name == "bert":
        sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        BertForMaskedLM(BertConfig(**sizes, num_hidden_layers=2)).save_pretrained(copy)
    else:
        shutil.copytree(checkpoints[name], copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, setting: 1}))
    with pytest.raises(InputError, match=rf"has weights of more layers than its config.json names .*{layers} has 1 "):
        load_encoder(str(copy), "tokens", "The teacher") if name == "bert" else load_model(str(copy))


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("family", ["T5", "MT5", "UMT5", "LongT5"])
def test_a_t5_that_has_lost_only_its_own_head_is_refused(family, quantization, tmp_path):
    """As T0's files, whose config says that the head is not the embeddings, which transformers would take for it."""
    if quantization == "int8":
        pytest.importorskip("bitsandbytes")
    sizes = {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = getattr(transformers, f"{family}Config")(**sizes, decoder_start_token_id=0)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    model.lm_head.weight = torch.nn.Parameter(model.shared.weight.detach().flip(1).clone())
    model.save_pretrained(tmp_path / "whole")
    file = tmp_path / "whole" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": False}))
    load_model(str(tmp_path / "whole"), quantization=quantization)
    with pytest.raises(
        InputError, match=r"is incomplete: 1 of its weights are not in the checkpoint \(lm_head\.weight\)"
    ):
        load_model(without(tmp_path / "whole", tmp_path / "copy", "lm_head"), quantization=quantization)


def test_a_missing_file_of_weights_is_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="4KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert load_model(str(tmp_path)) is not None
    shards[1].unlink()
    with pytest.raises(InputError, match=re.escape(shards[1].name)):
        load_model(str(tmp_path))


def test_a_weight_of_another_shape_is_refused(checkpoints, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(checkpoints["llama"], directory)
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="Could not load"):
        load_model(str(directory))
