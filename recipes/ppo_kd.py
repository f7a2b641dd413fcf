r"""PPO distillation: a teacher scores every token that a student samples, PPO with a value head updates the student.

    accelerate launch recipes/ppo_kd.py                                   # the embedded demo, no network
    accelerate launch recipes/ppo_kd.py --config recipes/configs/t0_3b_t5_base_dailydialog.yaml
    accelerate launch recipes/ppo_kd.py --teacher runs/teacher --student runs/warm --dataset train.csv \
        --source_column mr --target_column ref --templates templates.yaml --output_dir runs/ppo

The reward is the one that a teacher-forced language model implies (Hao, Liu & Mou 2022; Li, Hao & Mou 2024, "LLMR").
Where this differs from those papers: PPO with GAE and a critic instead of REINFORCE with a lagging behaviour policy;
every token's reward, with the teacher's V as baseline, and not only their sum; what is learnt is reward per token, as
the sum prefers short texts (`--average_reward none` learns it); completions that hit the length cap are bootstrapped
instead of dropped; sampling from the whole distribution instead of its top k.
"""

from pathlib import Path

from rlkd_trl.commands.distillation import distil
from rlkd_trl.errors import run

DEMO_PRESET = Path(__file__).parent / "configs" / "demo_ppo.yaml"


def main() -> None:
    # Parse, check, build, train, evaluate, save: the same for all methods of distillation.
    distil(
        recipe="ppo_kd",
        config="rlkd_trl.trainers.config:PPOKDConfig",
        trainer="rlkd_trl.trainers.ppo:PPOKDTrainer",
        title="PPO",
        description=__doc__,
        demo_preset=DEMO_PRESET,
    )


if __name__ == "__main__":
    run(main)
