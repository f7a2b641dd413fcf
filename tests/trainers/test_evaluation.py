import pytest
from sacrebleu.metrics import BLEU

from rlkd_trl import TeacherForcingReward
from rlkd_trl.evaluation.evaluate import evaluate_student
from rlkd_trl.teachers import Teacher, TeacherPanel
from tests.students.plain_forward import ALLOWED, plain_forward
from tests.tiny_models import EOS, MODELS, word_tokenizer
from tests.trainers.tiny_runs import METHODS, build, prompts


@pytest.mark.parametrize("method", METHODS)
def test_evaluate_reports_the_students_greedy_outputs(method, tmp_path):
    data = prompts(5, seed=3)
    trainer = build(method, tmp_path, eval_data=data)
    metrics = trainer.evaluate()
    assert {"eval_reward", "eval_teacher_nll_per_token", "eval_tokens", "eval_eos_rate"} <= metrics.keys()
    assert all(key.startswith("eval_") for key in metrics.keys() - {"epoch"})
    assert not any("bleu" in key for key in metrics)
    assert any("eval_reward" in entry for entry in trainer.state.log_history)

    student, tokens, ended = MODELS["t5-tied"](), 0, 0
    for row in data:
        prompt, completion = trainer.processing_class(row["prompt"])["input_ids"], []
        while len(completion) < 6 and (not completion or completion[-1] != EOS):
            logits = plain_forward(student, prompt, completion)[0][-1]
            completion.append(max(ALLOWED, key=lambda v: float(logits[v].detach())))
        tokens, ended = tokens + len(completion), ended + (completion[-1] == EOS)
    assert metrics["eval_tokens"] == pytest.approx(tokens / 5)
    assert metrics["eval_eos_rate"] == pytest.approx(ended / 5)


def test_references_give_text_metrics(tmp_path):
    """Of the student's own outputs and references that are some of these with a word changed, against sacrebleu."""
    trainer = build("ppo", tmp_path, per_device_eval_batch_size=2)
    data = prompts(5, seed=3)
    assert not any("bleu" in key or "rouge" in key for key in trainer.evaluate(data))
    outputs = evaluate_student(
        trainer.model, trainer.processing_class, list(data), None, max_prompt_length=None, max_completion_length=6
    ).outputs
    assert len(set(outputs)) >= 3, "rows in another order must show"

    def bleu(references: list[str]) -> float:
        return trainer.evaluate(data.add_column("references", [[text] for text in references]))["eval_bleu"]

    changed = [" ".join(["w3", *text.split()[1:]]) if i % 2 else text for i, text in enumerate(outputs)]
    assert bleu(outputs) == pytest.approx(100.0)
    assert bleu(changed) == pytest.approx(BLEU().corpus_score(outputs, [changed]).score)
    assert bleu(changed) < 95
    assert bleu(outputs[1:] + outputs[:1]) < 60
    assert bleu(["nothing like it"] * 5) < 5
    # One reference may stand there as it is, without a list around it.
    assert trainer.evaluate(data.add_column("references", outputs))["eval_bleu"] == pytest.approx(100.0)


def test_prefix_of_the_metrics(tmp_path):
    metrics = build("ppo", tmp_path).evaluate(prompts(2), metric_key_prefix="test")
    assert all(key.startswith("test_") for key in metrics.keys() - {"epoch"})


def test_several_evaluation_sets(tmp_path):
    """A dictionary of data sets, as in transformers: each under its own prefix, in one call and during training."""
    sets = {"easy": prompts(3, seed=3), "hard": prompts(2, seed=4)}
    trainer = build("ppo", tmp_path, max_steps=1, eval_data=sets, eval_strategy="steps", eval_steps=1)
    together = trainer.evaluate()
    for name, rows in sets.items():
        alone = trainer.evaluate(rows, metric_key_prefix=f"eval_{name}")
        assert "eval_easy_reward" in alone or "eval_hard_reward" in alone
        assert {key: together[key] for key in alone if key != "epoch"} == {
            key: value for key, value in alone.items() if key != "epoch"
        }
    trainer.train()
    logged = set().union(*trainer.state.log_history)
    assert {"eval_easy_reward", "eval_hard_reward"} <= logged


def test_evaluation_leaves_training_alone(tmp_path):
    """The same random numbers and the same weights, evaluated in between or not."""
    finals = []
    for evaluated in (False, True):
        extra = {"eval_strategy": "steps", "eval_steps": 1, "eval_data": prompts(3, seed=3)} if evaluated else {}
        trainer = build("rloo-token", tmp_path, max_steps=3, **extra)
        trainer.train()
        finals.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert finals[0] == pytest.approx(finals[1], rel=1e-6)


@pytest.mark.parametrize("shares", [(1.0, 3.0), (3.0, 1.0)])
def test_the_teachers_nll_is_the_weighted_mean_over_teachers(shares, tmp_path):
    """In the logs of training and in evaluations."""
    teachers = [Teacher(MODELS["t5-tied"](seed=seed), word_tokenizer()) for seed in (5, 6)]
    alone = []
    for reward in (*(TeacherForcingReward(teacher) for teacher in teachers),
                   TeacherForcingReward(TeacherPanel(teachers, teacher_weights=list(shares)))):  # fmt: skip
        trainer = build("rloo-token", tmp_path, reward=reward, max_steps=1, eval_data=prompts(3, seed=3))
        evaluated = trainer.evaluate()["eval_teacher_nll_per_token"]
        trainer.train()
        alone.append((evaluated, trainer.state.log_history[0]["teacher_nll"]))
    first, second, together = alone
    for one, other, both in zip(first, second, together, strict=True):
        assert both == pytest.approx((shares[0] * one + shares[1] * other) / 4, rel=1e-5)
        assert both != pytest.approx((one + other) / 2, rel=1e-3)
