"""The embedded demo of encoder distillation, on the task: how hard is the trail that a sentence describes?

The teacher, a BERT of four layers, is trained first, on masked words and then on labels, in a separate process that
knows nothing of how the run was launched (see `make_apart`).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlkd_trl.commands.apart import make_apart
from rlkd_trl.commands.encoder_data import Classes, with_numbers
from rlkd_trl.data.demo import DIFFICULTIES, SPLIT_SIZES, demo_sentences

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from rlkd_trl.commands.settings import EncoderSettings

_SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")


@dataclass(frozen=True)
class EncoderDemoRequest:
    """The teachers to train: of masked words in `output_dir/teacher`, of labels in `output_dir/task_teacher`."""

    output_dir: str
    seed: int
    general_steps: int = 200
    task_steps: int = 150

    @property
    def teacher(self) -> str:
        return str(Path(self.output_dir) / "teacher")

    @property
    def task_teacher(self) -> str:
        return str(Path(self.output_dir) / "task_teacher")


def use_demo_teachers(settings: "EncoderSettings", output_dir: str | Path, *, seed: int) -> None:
    """Makes the demo's teachers in `output_dir/demo_models` and names them in the settings."""
    request = EncoderDemoRequest(str(Path(output_dir) / "demo_models"), seed)
    make_demo_teachers(request)
    settings.teacher.teacher, settings.teacher.task_teacher = request.teacher, request.task_teacher


def make_demo_teachers(request: EncoderDemoRequest) -> None:
    """Has the teachers trained. Raises `RuntimeError` as `make_apart`."""
    make_apart("rlkd_trl.commands.encoder_demo:train_demo_teachers", request)


def write_demo_files(output_dir: str | Path) -> dict[str, str]:
    """The demo task's splits as files: JSON lines of `text` and `label`."""
    paths = {}
    for split in SPLIT_SIZES:
        path = Path(output_dir) / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in demo_sentences(split)), encoding="utf-8")
        paths[split] = str(path)
    return paths


def demo_tokenizer(texts: list[str]) -> "PreTrainedTokenizerFast":
    """A tokenizer of whole words that puts [CLS] before a text and [SEP] after it, as BERT's."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import WordLevelTrainer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(texts, WordLevelTrainer(special_tokens=list(_SPECIAL), show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    names = ("pad_token", "cls_token", "sep_token", "unk_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **dict(zip(names, _SPECIAL, strict=True)),
        model_max_length=128,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def train_demo_teachers(**fields) -> None:
    """Trains and saves, in this process, the teachers of an `EncoderDemoRequest` with these fields."""
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, set_seed

    request = EncoderDemoRequest(**fields)
    rows = demo_sentences("train")
    tokenizer = demo_tokenizer(rows["text"][:])
    names = dict(enumerate(DIFFICULTIES))
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=128,
        initializer_range=0.1,  # with BERT's 0.02 so narrow a model learns slowly
        pad_token_id=tokenizer.pad_token_id,
        id2label=names,
        label2id={name: number for number, name in names.items()},
    )
    set_seed(request.seed)
    print("Demo 1/2: training a teacher on masked words", flush=True)
    teacher = BertForMaskedLM(config)
    _fit(teacher, tokenizer, rows, request.teacher, "mlm_ce", steps=request.general_steps, seed=request.seed)

    print("Demo 2/2: fine-tuning it on the labels", flush=True)
    classifier = BertForSequenceClassification.from_pretrained(request.teacher)
    rows = with_numbers(rows, Classes(names), "label")
    _fit(classifier, tokenizer, rows, request.task_teacher, "hard_ce", steps=request.task_steps, seed=request.seed)


def _fit(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    rows: "Dataset",
    output_dir: str,
    loss: str,
    *,
    steps: int,
    seed: int,
) -> None:
    from rlkd_trl.trainers.encoder import EncoderKDTrainer
    from rlkd_trl.trainers.encoder_config import EncoderKDConfig

    args = EncoderKDConfig(
        output_dir,
        stages=["general" if loss == "mlm_ce" else "task"],
        losses=[loss],
        max_steps=steps,
        learning_rate=3e-3,
        warmup_steps=20,
        per_device_train_batch_size=32,
        logging_steps=max(steps // 5, 1),
        save_strategy="no",
        seed=seed,
    )
    trainer = EncoderKDTrainer(model, None, args, rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
