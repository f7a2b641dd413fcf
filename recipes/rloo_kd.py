r"""RLOO distillation: a teacher scores every token that a student samples; the completions of a prompt are compared.

    accelerate launch recipes/rloo_kd.py                                   # the embedded demo, no network
    accelerate launch recipes/rloo_kd.py --config recipes/configs/t0_3b_t5_base_dailydialog.yaml
    accelerate launch recipes/rloo_kd.py --teacher runs/teacher --student runs/warm --dataset train.csv \
        --source_column mr --target_column ref --templates templates.yaml --output_dir runs/rloo

REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024) on the reward that a teacher-forced language model
implies (Hao, Liu & Mou 2022). `--level sequence` is the paper's method, `--level token` credits each token with its
own return. Where this differs from the RLOO paper: the reward is the teacher's and needs no reward model; what is
learnt is reward per token, not the sum, which prefers short texts (`--average_reward none` learns it); the ratio is
clipped as in TRL; no KL penalty unless `--beta` is set; completions that hit the length cap are bootstrapped.
"""

from pathlib import Path

from rlkd_trl.commands.distillation import distil
from rlkd_trl.commands.settings import RewardedSettings
from rlkd_trl.errors import run

DEMO_PRESET = Path(__file__).parent / "configs" / "demo_rloo.yaml"


def title(settings: RewardedSettings) -> str:
    """What the results call the method."""
    return f"RLOO, {settings.args.level} level"


def main() -> None:
    # Parse, check, build, train, evaluate, save: the same for all methods of distillation.
    distil(
        recipe="rloo_kd",
        config="rlkd_trl.trainers.config:RLOOKDConfig",
        trainer="rlkd_trl.trainers.rloo:RLOOKDTrainer",
        title=title,
        description=__doc__,
        demo_preset=DEMO_PRESET,
    )


if __name__ == "__main__":
    run(main)
