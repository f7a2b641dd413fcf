"""Task stages of encoder-decoders and decoder-only models: losses as of plain transformers, text by text."""

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlkd_trl import EncoderKDConfig, EncoderKDTrainer
from rlkd_trl.errors import InputError
from rlkd_trl.models.encoders import load_encoder
from rlkd_trl.students.from_teacher import smaller_student
from tests.models.encoders import CLS, CONFIGS, SEP, encoder_tokenizer

WORDS = ["w5 w6 w7", "w8", "w9 w10 w11 w12 w13", "w14 w15"]
LABELS = [0, 2, 1, 2]
# (student's layer, teacher's) of each stack, by the uniform map; T5's and BART's decoders have one layer less.
PAIRS = {
    "t5": {"encoder": [(1, 2), (2, 4)], "decoder": [(1, 3)]},
    "bart": {"encoder": [(1, 2), (2, 4)], "decoder": [(1, 3)]},
    "llama": {"": [(1, 2), (2, 4)]},
}


def classifier(kind: str, layers: int, seed: int) -> PreTrainedModel:
    config = CONFIGS[kind](layers)
    config.num_labels = 3
    if kind == "llama":
        config.pad_token_id = None  # as published ones are
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(config).eval()


def tokenizer() -> PreTrainedTokenizerBase:
    found = encoder_tokenizer()
    found.model_input_names, found.eos_token = ["input_ids", "attention_mask"], "[SEP]"
    return found


def build(kind: str, losses: str, output_dir, rows=None, reads=None, **settings) -> EncoderKDTrainer:
    args = EncoderKDConfig(
        str(output_dir),
        losses=[losses],
        max_steps=1,
        learning_rate=0.1,
        max_grad_norm=0.0,
        logging_steps=1,
        disable_tqdm=True,
        save_strategy="no",
        max_length=32,
        temperature=[2.0],
        **settings,
    )
    rows = rows or [{"text": text, "label": label} for text, label in zip(WORDS, LABELS, strict=True)]
    models = classifier(kind, 2, seed=1), classifier(kind, 4, seed=2)
    return EncoderKDTrainer(*models, args, Dataset.from_list(rows), processing_class=reads or tokenizer())


def read(model: PreTrainedModel, text: str, kind: str) -> dict:
    ids = torch.tensor([[CLS, *(int(word[1:]) for word in text.split()), SEP]])
    outputs = model(input_ids=ids, output_hidden_states=True)
    names = {stack: f"{stack}_hidden_states".lstrip("_") for stack in PAIRS[kind]}
    return {"logits": outputs.logits[0], **{stack: outputs[name] for stack, name in names.items()}}


@pytest.mark.parametrize("kind", PAIRS)
def test_losses_are_those_of_plain_transformers(kind, tmp_path):
    """Of every text alone and unpadded; how the decoder is fed is left to transformers."""
    trainer = build(kind, "logits_kl+hard_ce+hidden_mse", tmp_path)
    models = trainer.student.model.eval(), trainer.teacher
    texts = [[read(model, text, kind) for model in models] for text in WORDS]
    hard = -sum(s["logits"].log_softmax(-1)[label] for (s, _), label in zip(texts, LABELS, strict=True)) / 4
    soft = 0.0
    for s, t in texts:
        p, q = ((x["logits"] / 2).softmax(-1) for x in (t, s))
        soft = soft + 4 * (p * (p.log() - q.log())).sum() / 4
    hidden = 0.0
    for stack, pairs in PAIRS[kind].items():
        by_token = [sum((s[stack][m][0] - t[stack][n][0]).square().mean(dim=-1) for m, n in pairs) for s, t in texts]
        hidden = hidden + torch.cat(by_token).mean()
    trainer.train()
    logged = trainer.state.log_history[0]
    for name, expected in (("hard_ce", hard), ("logits_kl", soft), ("hidden_mse", hidden)):
        assert logged[f"losses/{name}"] == pytest.approx(float(expected.detach()), rel=1e-4), name
    trainer.save_model()
    saved, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    trained = read(trainer.student.model.eval(), WORDS[0], kind)["logits"]
    torch.testing.assert_close(read(saved.eval(), WORDS[0], kind)["logits"], trained)


@pytest.mark.parametrize("kind", PAIRS)
def test_a_generative_student_learns_the_states_of_several_teachers(kind, tmp_path):
    """Σ_i MSE(H_i, W_i H_s), as MT-BERT's L_hid, and Σ_i T² KL, over tokens of each stack, of every text alone."""
    auto_class = AutoModelForCausalLM if kind == "llama" else AutoModelForSeq2SeqLM

    def model(layers: int, seed: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        return auto_class.from_config(CONFIGS[kind](layers)).eval()

    targets = [{} if kind == "llama" else {"text_pair": text} for text in reversed(WORDS)]
    rows = [{"text": text, **target} for text, target in zip(WORDS, targets, strict=True)]
    args = EncoderKDConfig(
        str(tmp_path),
        stages=["general"],
        losses=["hidden_mse + logits_kl"],
        temperature=[2.0],
        mlm_probability=0.0,  # no word is masked
        max_steps=1,
        learning_rate=0.1,
        max_grad_norm=0.0,
        logging_steps=1,
        disable_tqdm=True,
        save_strategy="no",
        max_length=32,
    )
    teachers = [model(4, seed=2), model(4, seed=3)]
    trainer = EncoderKDTrainer(
        model(2, seed=1), teachers[0], args, Dataset.from_list(rows), processing_class=tokenizer(),
        more_teachers=teachers[1:],
    )  # fmt: skip
    student, hidden, soft = trainer.student.eval(), {stack: [] for stack in PAIRS[kind]}, []
    for number in range(len(rows)):
        batch = trainer.data_collator([trainer.train_dataset[number]])
        inputs = {name: batch[name] for name in batch if "input_ids" in name}
        read_by = [one(**inputs, output_hidden_states=True) for one in (student.model, *teachers)]
        for stack, pairs in PAIRS[kind].items():
            s, *ts = [outputs[f"{stack}_hidden_states".lstrip("_")] for outputs in read_by]
            of_row = 0.0
            for t, suffix in zip(ts, ("", "_2"), strict=True):
                w = student.projections[f"{stack or 'decoder'}_hidden_mse{suffix}"]
                of_row = of_row + sum((w(s[m][0]) - t[n][0]).square().mean(dim=-1) for m, n in pairs)
            hidden[stack].append(of_row)
        s, *ts = [(outputs.logits[0] / 2).log_softmax(-1) for outputs in read_by]
        soft.append(sum(4 * (t.exp() * (t - s)).sum(dim=-1) for t in ts))
    expected = sum(torch.cat(by_token).mean() for by_token in hidden.values()), torch.cat(soft).mean()
    trainer.train()
    logged = trainer.state.log_history[0]
    for name, value in zip(("hidden_mse", "logits_kl"), expected, strict=True):
        assert logged[f"losses/{name}"] == pytest.approx(float(value.detach()), rel=1e-4), name


@pytest.mark.parametrize("kind", PAIRS)
def test_every_loss_that_makes_sense_is_zero_for_a_student_that_is_its_teacher(kind, tmp_path):
    losses = "embedding_mse hidden_mse cosine attention_mse attention_kl query_relation_kl key_relation_kl"
    trainer = build(kind, "+".join([*losses.split(), "value_relation_kl", "logits_kl"]), tmp_path)
    same = EncoderKDTrainer(
        classifier(kind, 4, seed=2),
        classifier(kind, 4, seed=2),
        trainer.args,
        trainer.train_dataset.rows,
        processing_class=tokenizer(),
    )
    same.train()
    assert abs(same.state.log_history[0]["loss"]) < 1e-6
    assert all(v > 1e-4 for k, v in trainer.evaluate(trainer.train_dataset.rows).items() if "losses/" in k)
    assert same.state.log_history[0]["grad_norm"] < 1e-4


@pytest.mark.parametrize("kind", PAIRS)
def test_the_first_tokens_state_is_refused(kind, tmp_path):
    with pytest.raises(InputError, match=f"know nothing of the text behind it, and the student is a {kind}: use hidd"):
        build(kind, "cls_mse+hard_ce", tmp_path)


def test_texts_must_end_with_eos_and_have_no_other(tmp_path):
    rows = [{"text": "w5", "label": 0}, {"text": "w6 [SEP] w7", "label": 1}]
    with pytest.raises(InputError, match=r"Row 2: the text holds \[SEP\], and a t5 classifies a text by its state at"):
        build("t5", "hard_ce", tmp_path, rows)
    without = tokenizer()
    without.backend_tokenizer.post_processor = None
    with pytest.raises(InputError, match=r"the tokenizer ends no text with the model's, 2: save the checkpoint's own"):
        build("t5", "hard_ce", tmp_path, reads=without)


def test_a_tokenizer_without_a_pad_token_is_refused(tmp_path):
    without = tokenizer()
    without.pad_token = None
    with pytest.raises(InputError, match=r"no pad token to fill up batches with: set one, as `tokenizer.pad_token"):
        build("llama", "hard_ce", tmp_path, reads=without)


@pytest.mark.parametrize("kind", PAIRS)
def test_a_teachers_head_is_not_needed_where_no_loss_reads_it(kind, tmp_path):
    classifier(kind, 4, seed=2).save_pretrained(tmp_path)
    teacher = load_encoder(str(tmp_path), "none", "The teacher")
    assert not {"lm_head", "score", "classification_head"} & {name.split(".")[0] for name in teacher.state_dict()}


@pytest.mark.parametrize(
    ("kind", "sizes", "expected"),
    [
        ("t5", {"hidden_size": 8}, {"d_model": 8, "d_kv": 4}),
        ("llama", {"hidden_size": 8}, {"head_dim": 2, "num_key_value_heads": 2}),
        ("llama", {"num_heads": 1}, {"head_dim": 16, "num_key_value_heads": 1}),
        ("llama", {"num_heads": 8, "num_layers": 2}, {"head_dim": 2, "num_key_value_heads": 2}),
    ],
)
def test_heads_of_a_student_of_another_size(kind, sizes, expected):
    student = smaller_student(classifier(kind, 4, seed=2), sizes, init="random")
    assert {name: getattr(student.config, name) for name in expected} == expected
    student(input_ids=torch.tensor([[CLS, 5, SEP]]))
