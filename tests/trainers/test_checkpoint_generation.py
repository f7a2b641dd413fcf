"""A trained checkpoint under plain `generate` says what evaluation says, and what its targets said."""

import pytest
import torch
from datasets import Dataset
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    TrainerCallback,
)

from rlkd_trl import TeacherForcingReward
from rlkd_trl.evaluation.evaluate import evaluate_student
from rlkd_trl.models.answers import answer_prompts, decode
from rlkd_trl.models.loading import load_model, load_tokenizer
from rlkd_trl.rewards.teacher_rewards import LogLikelihoodReward
from rlkd_trl.students import Policy
from rlkd_trl.teachers import Teacher
from rlkd_trl.trainers.supervised import SupervisedTrainer
from rlkd_trl.trainers.supervised_config import SupervisedConfig
from tests.models.bart_like import LANGUAGE, bart_like, checkpoint_texts, tokenizer
from tests.tiny_models import EOS, tiny_llama, tiny_t5
from tests.trainers.tiny_runs import build, prompts

LENGTH = 7


def texts(count: int = 9) -> list[tuple[str, str]]:
    """Pairs of up to five target words: more rows than a batch."""
    return [
        (f"w{3 + i} w{20 - i}", " ".join(f"w{3 + (5 * i + j) % 24}" for j in range(2 + i % 4))) for i in range(count)
    ]


def marked(count: int = 9) -> list[tuple[str, str]]:
    return [(f"w{3 + i}", f"<triplet> w{4 + i} <subj> w{20 - i}") for i in range(count)]


# BART and mBART-50, M2M100 and NLLB start with EOS and are forced to say BOS or the language's code; mBART-25 starts
# with the code.
MODELS = {
    "bart": lambda: bart_like("Bart", start=EOS, forced=LANGUAGE),
    "mbart-50": lambda: bart_like("MBart", start=EOS, forced=LANGUAGE),
    "mbart-25": lambda: bart_like("MBart", start=LANGUAGE, forced=None),
    "m2m100": lambda: bart_like("M2M100", start=EOS, forced=LANGUAGE),
    "t5": lambda: tiny_t5(tied=False),
    "llama": tiny_llama,
}


class UntilKnown(TrainerCallback):
    """Ends training at a loss that leaves no doubt about any token, however many steps a CPU's rounding takes."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        control.should_training_stop |= logs.get("loss", 1.0) < 0.01


def learn(model: PreTrainedModel, pairs: list[tuple[str, str]], directory) -> None:
    args = SupervisedConfig(
        str(directory),
        max_steps=400,
        per_device_train_batch_size=len(pairs),
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_completion_length=LENGTH,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = Dataset.from_list([{"prompt": prompt, "target": target} for prompt, target in pairs])
    trainer = SupervisedTrainer(model, args, rows, tokenizer(), callbacks=[UntilKnown()])
    trainer.train()
    trainer.save_model()


def our_texts(model, words, sources: list[str], **settings) -> list[str]:
    batches = answer_prompts(model, words, sources, max_completion_length=LENGTH, batch_size=4, **settings)
    return [text for batch in batches for text in decode(batch, words)]


@pytest.mark.slow(0.5)
@pytest.mark.parametrize("name", MODELS)
def test_what_was_learnt_is_said_and_scored_alike_everywhere(name, tmp_path):
    pairs = texts()
    learn(MODELS[name](), pairs, tmp_path)
    sources, targets = [source for source, _ in pairs], [target for _, target in pairs]
    model, words = load_model(str(tmp_path)), load_tokenizer(str(tmp_path))
    assert checkpoint_texts(tmp_path, sources) == targets, "the test needs a model that knows its pairs"
    assert our_texts(model, words, sources) == targets
    assert our_texts(model, words, sources, strategy="beam", num_beams=3) == checkpoint_texts(
        tmp_path, sources, num_beams=3
    )
    rows = [{"prompt": source, "references": [target]} for source, target in pairs]
    settings = {"max_prompt_length": None, "max_completion_length": LENGTH, "batch_size": 4}
    result = evaluate_student(Policy(model, words), words, rows, None, **settings)
    assert result.outputs == targets and result.metrics["bleu"] == pytest.approx(100)
    assert result.metrics["eos_rate"] == 1 and result.metrics["tokens"] == sum(len(t.split()) + 1 for t in targets) / 9
    # As a teacher, it finds its targets likely from their first token on.
    teacher = Teacher(model, words)
    completions = [[*words(target, add_special_tokens=False)["input_ids"], EOS] for target in targets]
    logps = LogLikelihoodReward(teacher).score_tokens(sources, completions)
    assert min(float(of_text.min()) for of_text in logps) > -0.1


@pytest.mark.parametrize("name", ["bart", "m2m100"])
@torch.no_grad()
def test_log_probs_after_a_forced_bos_are_those_of_the_models_own_forward_pass(name):
    model, words = MODELS[name]().eval(), tokenizer()
    policy, completion = Policy(model, words), [5, 9, 7, EOS]
    ids, mask = torch.tensor([[8, 6, EOS]]), torch.ones(1, 3, dtype=torch.long)
    completion_1T = torch.tensor([completion])
    found = policy(ids, mask, torch.tensor([0]), completion_1T, torch.ones_like(completion_1T, dtype=torch.bool))
    logits = model(input_ids=ids, decoder_input_ids=torch.tensor([[EOS, LANGUAGE, *completion[:-1]]])).logits[0, 1:]
    allowed = [EOS, *range(3, 27)]  # pad, unknown, sentinels and all special tokens are not
    expected = [logits[t, allowed].log_softmax(dim=-1)[allowed.index(v)] for t, v in enumerate(completion)]
    torch.testing.assert_close(found.logps_BT[0], torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.slow(0.4)
@pytest.mark.parametrize("name", ["bart", "t5", "llama"])
def test_special_tokens_of_the_targets_are_content(name, tmp_path):
    pairs = marked()
    sources, targets = [source for source, _ in pairs], [target for _, target in pairs]
    learn(MODELS[name](), pairs, tmp_path)
    assert checkpoint_texts(tmp_path, sources) == targets, "the test needs a model that knows its pairs"
    model, words = load_model(str(tmp_path)), load_tokenizer(str(tmp_path))
    assert our_texts(model, words, sources) == targets
    assert our_texts(model, words, sources, strategy="beam", num_beams=2) == targets
    assert Policy(model, words).forbidden_V.nonzero()[:, 0].tolist() == [0, 2, 27, 28, LANGUAGE]


def test_teacher_and_student_share_what_any_of_them_and_the_targets_may_say(tmp_path):
    """The student's checkpoint says <triplet>, the references <subj>; sentinels in them are not content."""
    words = tokenizer()
    student, teacher = tiny_t5(tied=True), tiny_t5(tied=True, seed=5)
    student.generation_config.allowed_special_tokens = ["<triplet>"]
    data = prompts(8).add_column("references", [["w3 <subj> w4", "<extra_id_0> w5"]] * 8)
    reward = TeacherForcingReward(Teacher(teacher, words))
    trainer = build("rloo-token", tmp_path, model=student, reward=reward, data=data, tokenizer=words)
    assert trainer.policy.forbidden_V.nonzero()[:, 0].tolist() == [0, 2, 27, 28, LANGUAGE]
    assert Policy(teacher, words).forbidden_V.tolist() == trainer.policy.forbidden_V.tolist()
    trainer.save_model()
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert saved.allowed_special_tokens == ["<triplet>", "<subj>"]
    assert saved.bad_words_ids == [[0], [2], [27], [28], [LANGUAGE]]
    assert saved.max_new_tokens == trainer.args.max_completion_length


# What would change the distribution, or the way to decode it, if anything here or `generate` itself were to read it.
LEFTOVERS = {
    "repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "min_length": 6,
    "min_new_tokens": 6,
    "suppress_tokens": [5, 6, 7],
    "bad_words_ids": [[8], [9, 10]],
    "begin_suppress_tokens": [3, 4],
    "forced_eos_token_id": 9,
    "length_penalty": 5.0,
    "early_stopping": True,
    "num_beams": 4,
    "do_sample": True,
    "temperature": 0.1,
    "top_k": 3,
    "return_dict_in_generate": True,
    "output_scores": True,
    "num_return_sequences": 2,
    "max_length": 3,
    "renormalize_logits": True,
}


@pytest.mark.parametrize("strategy", ["greedy", "sample", "beam"])
@pytest.mark.parametrize("name", ["bart", "t5", "llama"])
def test_only_the_ids_of_a_generation_config_are_read(name, strategy):
    sources, words = [source for source, _ in texts()], tokenizer()
    model = MODELS[name]()
    expected = our_texts(model, words, sources, strategy=strategy)
    for setting, value in LEFTOVERS.items():
        setattr(model.generation_config, setting, value)
    before = model.generation_config.to_dict()
    assert our_texts(model, words, sources, strategy=strategy) == expected
    assert model.generation_config.to_dict() == before


@pytest.mark.slow(0.4)
@pytest.mark.parametrize("name", ["bart", "t5", "llama"])
def test_a_trained_checkpoint_has_none_of_them_and_is_not_cut(name, tmp_path):
    """Where plain `generate` would stop after 20 tokens."""
    model = MODELS[name]()
    for setting, value in LEFTOVERS.items():
        setattr(model.generation_config, setting, value)
    with torch.no_grad():
        model.get_output_embeddings().weight[EOS] = 0  # so that nothing ends by itself
    rows = [{"prompt": source, "target": target} for source, target in texts()]
    args = SupervisedConfig(
        str(tmp_path), max_steps=1, learning_rate=0.0, max_completion_length=25, save_steps=1, use_cpu=True
    )
    trainer = SupervisedTrainer(model, args, Dataset.from_list(rows), tokenizer())
    trainer.train()
    trainer.save_model()
    sources = [row["prompt"] for row in rows]
    batches = answer_prompts(load_model(str(tmp_path)), tokenizer(), sources, max_completion_length=25)
    expected = [text for batch in batches for text in decode(batch, tokenizer())]
    assert max(len(text.split()) for text in expected) == 25
    for directory in (tmp_path, tmp_path / "checkpoint-1"):
        assert checkpoint_texts(directory, sources) == expected
