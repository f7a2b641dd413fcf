r"""REINFORCE distillation as in LLMR and KETCHUP: a teacher scores every token that a lagging student samples.

    accelerate launch recipes/reinforce_kd.py                              # the embedded demo, no network
    accelerate launch recipes/reinforce_kd.py --config recipes/configs/llmr_t0_3b_t5_base.yaml
    accelerate launch recipes/reinforce_kd.py --teacher runs/teacher --student runs/warm --dataset train.csv \
        --source_column mr --target_column ref --templates templates.yaml --output_dir runs/reinforce

Plain policy gradient on the reward that a teacher-forced language model implies (Hao, Liu & Mou 2022; Li, Hao & Mou
2024, "LLMR"), with their lagging behaviour policy (`--behaviour_sync_steps`), top-k sampling, divided and clipped
returns; on K-step returns with `--k` (Fan, Luo, Bowling & Mou 2026, "KETCHUP"). Where this differs from the papers,
the presets naming their values: by default the student itself samples, from all tokens, with the mean as baseline and
the teacher's V_t as potential, and completions that hit the length cap are bootstrapped; with `--top_k` the importance
ratio is over the sampled-from tokens for both policies; the entropy bonus is the entropy.
"""

from pathlib import Path

from rlkd_trl.commands.distillation import distil
from rlkd_trl.commands.settings import RewardedSettings
from rlkd_trl.errors import run

DEMO_PRESET = Path(__file__).parent / "configs" / "demo_reinforce.yaml"


def title(settings: RewardedSettings) -> str:
    """What the results call the method."""
    k = settings.reward.k
    return "REINFORCE" if k == 1 else f"REINFORCE on {k}-step returns"


def main() -> None:
    # Parse, check, build, train, evaluate, save: the same for all methods of distillation.
    distil(
        recipe="reinforce_kd",
        config="rlkd_trl.trainers.config:ReinforceKDConfig",
        trainer="rlkd_trl.trainers.reinforce:ReinforceKDTrainer",
        title=title,
        description=__doc__,
        demo_preset=DEMO_PRESET,
    )


if __name__ == "__main__":
    run(main)
