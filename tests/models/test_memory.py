"""What a process holds after a model has been loaded."""

import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from rlkd_trl.models import memory
from tests.distributed.launching import run_forked
from tests.tiny_models import word_tokenizer

# Loads the model that is named, and prints by how many MiB the memory that belongs to no file has grown.
GROWTH = """
import sys, bitsandbytes
from rlkd_trl.models.loading import load_model
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
before = anonymous()
model = load_model(sys.argv[1], dtype="bfloat16", quantization=sys.argv[2])
print(anonymous() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and glibc's heap is meant")
@pytest.mark.slow(6)
def test_quantised_weights_are_not_kept_beside_the_whole_ones(tmp_path):
    """56 million weights are quantised, to 56 MiB in int8; those that are not stay in the mapped file."""
    sizes = {"vocab_size": 64, "d_model": 1024, "d_ff": 4096, "num_layers": 2, "num_heads": 16, "d_kv": 64}
    config = T5Config(**sizes, feed_forward_proj="gated-gelu", decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).to(torch.bfloat16)
    layers = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "wo" not in name]
    quantised = sum(m.weight.numel() for m in layers if m is not model.lm_head) / 2**20
    model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "growth.py").write_text(GROWTH)
    for quantization, share in [("int8", 1.0), ("nf4", 0.5)]:
        flags = [str(tmp_path / "growth.py"), str(tmp_path), quantization]
        growth = float(run_forked("tests.distributed.forked_script", tmp_path, [{}], *flags).split()[-1])
        assert share * quantised <= growth < 1.25 * share * quantised + 16, quantization


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap is meant")
@pytest.mark.parametrize("name", ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "OTHER"])
def test_thresholds_that_the_environment_sets_stay(name, monkeypatch):
    calls = []
    libc = SimpleNamespace(mallopt=lambda option, value: calls.append(option))
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda library: libc)
    for setting in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(setting, raising=False)
    monkeypatch.setenv(name, "65536")
    with memory.giving_back_what_is_freed():
        pass
    assert calls == ([-3, -3, -1] if name == "OTHER" else [])
