"""Tiny models and a word-level tokenizer, so that no test needs a network or a minute."""

import functools
import gc
import os
import signal
from collections import Counter

# The Hugging Face libraries read it when they are imported: no test asks the real Hub, whatever the machine's network.
os.environ["HF_HUB_OFFLINE"] = "1"
# The models are so small that threads only wait for each other; and a sum split over them rounds in another order.
# The programs that tests start read it too: with two threads beside another test some take four times the CPU time.
os.environ["OMP_NUM_THREADS"] = "1"

import accelerate.utils.imports
import hypothesis
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    Glm4Config,
    Glm4ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

# What is written outlives a killed process without it, and no test cuts the power: each checkpoint of a few bytes
# would wait for the disk twenty times. Called with what is no open file, it fails as the real one does. That it is
# called is for `tests/resuming/test_checkpoint_files.py`.
os.fsync = lambda descriptor: os.fstat(descriptor) and None
# Accelerate looks on the disk for DeepSpeed whenever it unwraps a model, for half a millisecond and more. That it is
# there is found out before a test could hide it.
accelerate.utils.imports._is_package_available = functools.cache(accelerate.utils.imports._is_package_available)
accelerate.utils.imports.is_deepspeed_available()
# The same examples in every run, however long one takes on a busy machine.
hypothesis.settings.register_profile(
    "tests",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tests")
# A shell has the jobs that it starts in the background ignore Ctrl-C; the tests of Ctrl-C need it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

PAD, EOS, UNK = 0, 1, 2
WORDS = 24
SENTINELS = 2
VOCAB = 3 + WORDS + SENTINELS
PADDED_VOCAB = VOCAB + 3  # LM-head rows beyond the tokenizer, as in T5


def word_tokenizer(*, append_eos: bool = True) -> PreTrainedTokenizerFast:
    """`<pad>` 0, `</s>` 1, `<unk>` 2, w3 .. w26, two sentinels at the end; T5-style EOS after each text."""
    vocab = {"<pad>": PAD, "</s>": EOS, "<unk>": UNK, **{f"w{i}": i for i in range(3, 3 + WORDS)}}
    vocab |= {f"<extra_id_{i}>": VOCAB - 1 - i for i in range(SENTINELS)}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if append_eos:
        tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=[f"<extra_id_{i}>" for i in range(SENTINELS)],
        model_input_names=["input_ids", "attention_mask"],
    )


# Of `chat_tokenizer`: the words that begin a turn, and the one that ends it.
USER, ASSISTANT, SYSTEM, END = "w23", "w24", "w25", "w26"
CHAT_TEMPLATE = (
    "{%- for m in messages -%}"
    "{{ {'user': 'w23', 'assistant': 'w24', 'system': 'w25'}[m.role] }} {{ m.content }} w26 {% endfor -%}"
    "{%- if add_generation_prompt %}w24 {% endif -%}"
)


def chat_tokenizer(template: str | None = CHAT_TEMPLATE, **kwargs) -> PreTrainedTokenizerFast:
    """A `word_tokenizer` with a chat template of four special tokens, of which its EOS, `</s>`, is none."""
    tokenizer = word_tokenizer(append_eos=False, **kwargs)
    tokenizer.add_tokens([USER, ASSISTANT, SYSTEM, END], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def tiny_t5(*, tied: bool, seed: int = 0, d_model: int = 16, layers: int = 2, dropout: float = 0.0) -> PreTrainedModel:
    """Tied and scaled head with ReLU (t5-base) or untied with gated GELU (T0, Flan-T5)."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=PADDED_VOCAB,
        d_model=d_model,
        d_kv=8,
        d_ff=32,
        num_layers=layers,
        num_heads=2,
        dropout_rate=dropout,
        tie_word_embeddings=tied,
        feed_forward_proj="relu" if tied else "gated-gelu",
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
    )
    model = T5ForConditionalGeneration(config)
    if (
        not tied
    ):  # a new T5 is tied whatever its config says (transformers 5); only a checkpoint's two matrices untie it
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    # T5's initialisation gives logits in the hundreds without training; small weights make ordinary ones.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model.eval()


def tiny_llama(*, seed: int = 0, hidden_size: int = 16) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=PADDED_VOCAB,
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config).eval()


def tiny_glm(*, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Glm4Config(
        vocab_size=PADDED_VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.3,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    return Glm4ForCausalLM(config).eval()


MODELS = {
    "t5-tied": lambda seed=0: tiny_t5(tied=True, seed=seed),
    "t5-untied": lambda seed=0: tiny_t5(tied=False, seed=seed),
    "llama": lambda seed=0: tiny_llama(seed=seed),
    "glm": lambda seed=0: tiny_glm(seed=seed),
}


MOST_WORKERS = 4


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """`pytest` alone, which is all tests, takes a process for each core where pytest-xdist is installed; as with -n.

    Tests of one file stay in one process: they share models, runs and launches. `pytest -n 0` is one process again,
    and so is a command that names files or directories.
    """
    is_whole_suite = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    is_asked = getattr(config.option, "numprocesses", 0) is not None  # 0: not installed
    if is_asked or not is_whole_suite or hasattr(config, "workerinput") or config.option.usepdb:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores > 1:
        config.option.numprocesses, config.option.dist = min(cores, MOST_WORKERS), "loadfile"
        config.option.loadscopereorder = False  # by number of tests; here files go as below


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of several processes each takes the longest files first, so that none ends long after another."""
    if hasattr(config, "workerinput"):
        of_file = Counter()
        for item in items:
            of_file[item.path] += cpu_seconds(item)
        items.sort(key=lambda item: -of_file[item.path])


def cpu_seconds(item: pytest.Item) -> float:
    """About how long a test takes: what its mark says, `slow(60)`, or what most do."""
    mark = item.get_closest_marker("slow")
    return 0.05 if mark is None else mark.args[0] if mark.args else 3.0


@pytest.fixture(scope="module", autouse=True)
def imported_modules_are_no_garbage():
    """`Trainer.train` collects garbage, which takes longer over the imported libraries than the few steps do."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture(params=list(MODELS))
def any_model(request) -> PreTrainedModel:
    """One of each family and head kind."""
    return MODELS[request.param]()
