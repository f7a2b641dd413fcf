"""What is wrong is said before anything is trained."""

from collections.abc import Iterator

import pytest
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from rlkd_trl import TeacherForcingReward
from rlkd_trl.errors import InputError
from rlkd_trl.rewards import LogLikelihoodReward, RewardModel
from tests.tiny_models import EOS, MODELS, tiny_t5, word_tokenizer
from tests.trainers.test_peft import lora_student
from tests.trainers.tiny_runs import METHODS, build, prompts, teacher_reward

METHOD_NAMES = list(METHODS)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_no_prompt_column(method, tmp_path):
    with pytest.raises(InputError, match=r"prompt.*its columns are: mr, ref"):
        build(method, tmp_path, data=Dataset.from_dict({"mr": ["a"] * 8, "ref": ["b"] * 8}))


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_too_few_prompts(method, tmp_path):
    # 8 completions × 2 micro-batches / 2 a prompt = 8 prompts
    settings = {"gradient_accumulation_steps": 2}
    with pytest.raises(InputError, match=r"takes 8 prompts.*the data has 7"):
        build(method, tmp_path, data=prompts(7), **settings)
    build(method, tmp_path, data=prompts(8), **settings)


def test_different_vocabularies(tmp_path):
    other = word_tokenizer()
    other.add_tokens(["w99"])
    with pytest.raises(InputError, match="w99"):
        build("ppo", tmp_path, reward=TeacherForcingReward(tiny_t5(tied=True), other))


def test_different_eos(tmp_path):
    other: PreTrainedTokenizerFast = word_tokenizer()
    other.eos_token = "w5"
    assert other.get_vocab() == word_tokenizer().get_vocab() and other.eos_token_id != EOS
    with pytest.raises(InputError, match="EOS"):
        build("ppo", tmp_path, reward=TeacherForcingReward(tiny_t5(tied=True), other))


def test_every_term_of_several_is_checked(tmp_path):
    other = word_tokenizer()
    other.add_tokens(["w99"])
    with pytest.raises(InputError, match="w99"):
        build("ppo", tmp_path, reward=[teacher_reward(), TeacherForcingReward(tiny_t5(tied=True), other)])


def test_reward_weights_of_another_number(tmp_path):
    with pytest.raises(InputError, match="3 reward weights for 1 rewards"):
        build("ppo", tmp_path, reward_weights=[1.0, 2.0, 3.0])


def test_reward_weights_are_not_ignored_beside_a_reward_model(tmp_path):
    """The model has weights of its own: two sets of weights cannot both hold."""
    with pytest.raises(InputError, match="reward_weights"):
        build("ppo", tmp_path, reward=RewardModel([teacher_reward()], [2.0]), reward_weights=[0.5])


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_reward_and_returns_are_discounted_alike(method, tmp_path):
    """r_t = q_t − γ V_{t+1} telescopes only if returns are discounted by the same γ."""
    with pytest.raises(InputError, match=r"gamma 0\.9, the trainer 1\.0"):
        build(method, tmp_path, reward=teacher_reward(gamma=0.9))
    with pytest.raises(InputError, match=r"gamma 1\.0, the trainer 0\.5"):
        build(method, tmp_path, reward=[LogLikelihoodReward(teacher_reward().panel), teacher_reward()], gamma=0.5)
    with pytest.raises(InputError, match=r"gamma 0\.9, the trainer 1\.0"):
        build(method, tmp_path, reward=RewardModel([teacher_reward(gamma=0.9)]))
    build(method, tmp_path, reward=teacher_reward(gamma=0.9), gamma=0.9)


def test_k_step_returns_are_refused_where_gae_would_take_them_apart(tmp_path):
    with pytest.raises(InputError, match=r"k = 3 .* set lam to 1 \(it is 0\.95\)"):
        build("ppo", tmp_path, reward=teacher_reward(k=3), lam=0.95)
    build("ppo", tmp_path, reward=teacher_reward(k=3), lam=1.0, average_reward="none")
    build("rloo-token", tmp_path, reward=teacher_reward(k=3), average_reward="none")
    build("reinforce", tmp_path, reward=teacher_reward(k=3))


@pytest.mark.parametrize("average_reward", ["rollout", "prompt"])
@pytest.mark.parametrize(("method", "settings"), [("ppo", {"lam": 1.0}), ("rloo-token", {}), ("rloo-sequence", {})])
def test_k_step_returns_are_refused_where_an_average_per_token_is_subtracted(
    method, settings, average_reward, tmp_path
):
    """Of rewards at every third token only: completions that are as good per token would differ by their length."""
    with pytest.raises(InputError, match=r"k = 3 .* would prefer long texts: set average_reward to 'none'"):
        build(method, tmp_path, reward=teacher_reward(k=3), average_reward=average_reward, **settings)
    build(method, tmp_path, reward=teacher_reward(k=1), average_reward=average_reward, **settings)


def test_evaluation_data_without_prompts(tmp_path):
    wrong = Dataset.from_dict({"mr": ["a"]})
    for data in (wrong, {"easy": prompts(2), "hard": wrong}):
        with pytest.raises(InputError, match=r"evaluation data has no column `prompt`; its columns are: mr"):
            build("ppo", tmp_path, eval_data=data)
    with pytest.raises(InputError, match="eval_dataset"):
        build("ppo", tmp_path).evaluate()


@pytest.mark.parametrize("references", [3, [3], ["w3", None], {"text": "w3"}])
@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_references_that_are_no_texts(kind, references, tmp_path):
    rows = [{"prompt": "w3", "references": references} for _ in range(8)]
    data = {"training": {"data": Dataset.from_list(rows)}, "evaluation": {"eval_data": Dataset.from_list(rows)}}
    with pytest.raises(InputError, match=f"Row 1 of the {kind} data: `references` is .*, not a text, a list of texts"):
        build("ppo", tmp_path, **data[kind])


@pytest.mark.parametrize("references", [None, "w3 w4", ["w3", "w4"], []])
def test_references_that_are_texts_or_none(references, tmp_path):
    rows = [{"prompt": "w3", "references": references} for _ in range(8)]
    build("ppo", tmp_path, data=Dataset.from_list(rows), eval_data=Dataset.from_list(rows))


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_evaluations_without_rows(method, tmp_path):
    with pytest.raises(InputError, match="eval_strategy = steps evaluates on held-out rows, of which there are none"):
        build(method, tmp_path, eval_strategy="steps", eval_steps=1)


def test_rewards_without_gamma_go_with_any(tmp_path):
    build("ppo", tmp_path, reward=LogLikelihoodReward(teacher_reward().panel), gamma=0.5)


@pytest.mark.parametrize("reward", [3, "bleu", [teacher_reward, None]])
def test_a_reward_that_is_none(reward, tmp_path):
    reward = [reward[0](), reward[1]] if isinstance(reward, list) else reward
    with pytest.raises(InputError, match=r"A reward is a function or a TeacherReward; (3|'bleu'|None) is neither"):
        build("rloo-token", tmp_path, reward=reward)


def test_no_reward(tmp_path):
    with pytest.raises(InputError, match="reward"):
        build("ppo", tmp_path, reward=[])


def test_loaded_student_without_tokenizer(tmp_path):
    trainer_class, config_class, _ = METHODS["ppo"]
    args = config_class(output_dir=str(tmp_path), per_device_train_batch_size=8)
    with pytest.raises(InputError, match="processing_class"):
        trainer_class(MODELS["llama"](), teacher_reward("llama"), args, prompts(32))


@pytest.mark.parametrize("method", [*METHODS, "kd", "all-actions"])
def test_a_student_sharded_by_fsdp(method, tmp_path, monkeypatch):
    """As `accelerate launch` with FSDP says so."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match=r"cannot be sharded by FSDP.*accelerate_configs/zero3\.yaml"):
        build(method, tmp_path)


@pytest.fixture
def zero3() -> Iterator[dict]:
    """DeepSpeed's settings of this run, as transformers looks them up."""
    settings = {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}}
    alive = HfDeepSpeedConfig(settings)
    yield alive.config
    unset_hf_deepspeed_config()


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_zero3_without_one_consolidated_checkpoint(method, zero3, tmp_path):
    del zero3["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    with pytest.raises(InputError, match="zero3_save_16bit_model: true"):
        build(method, tmp_path)


@pytest.mark.parametrize("method", ["ppo", "kd"])
def test_zero3_for_a_student_with_adapters_on_its_head(method, zero3, tmp_path):
    with pytest.raises(InputError, match="whose LM head has adapters"):
        build(method, tmp_path, family="glm", model=lora_student("glm"))


STREAM = IterableDataset.from_generator(lambda: iter([{"prompt": "w3"}]))


@pytest.mark.parametrize("method", ["ppo", "kd"])
@pytest.mark.parametrize(
    "data, message",
    [
        (
            Dataset.from_dict({"prompt": ["w3"] * 6 + [None] + ["w3"] * 5}),
            r"Row 7 of the .*`prompt` is None \(NoneType\)",
        ),
        (Dataset.from_dict({"prompt": list(range(12))}), r"Row 1 of the .* data: `prompt` is 0 \(int\), not text"),
        (
            Dataset.from_dict({"prompt": [["w3"]] * 12}),
            r"Row 1 of the .* data: `prompt` is \['w3'\] \(list\), not text",
        ),
        (
            STREAM,
            r"data is of the type IterableDataset: give a datasets\.Dataset, .*Dataset\.from_list\(list\(rows\)\)",
        ),
        ([{"prompt": "w3"}] * 12, r"data is of the type list: give a datasets\.Dataset"),
    ],
)
def test_prompts_that_are_no_texts(data, message, method, tmp_path):
    with pytest.raises(InputError, match=message):
        build(method, tmp_path, data=data)
    with pytest.raises(InputError, match=message):
        build(method, tmp_path, eval_data=data)


@pytest.mark.parametrize("prompt, kind", [(None, "NoneType"), (3, "int"), (b"w3", "bytes")])
def test_a_reward_of_prompts_that_are_no_texts(prompt, kind):
    reward, prompts = teacher_reward(), ["w3", prompt]
    for score in (
        lambda: reward.score_tokens(prompts, [[4, 1], [5, 1]]),
        lambda: reward(prompts=prompts, completion_ids=[[4, 1], [5, 1]]),
    ):
        with pytest.raises(InputError, match=rf"Prompt 2 is .* \({kind}\), not text"):
            score()
