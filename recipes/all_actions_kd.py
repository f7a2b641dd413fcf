r"""All-actions distillation: the policy gradient exact over the next token, sampled over what follows it.

    accelerate launch recipes/all_actions_kd.py                            # the embedded demo, no network
    accelerate launch recipes/all_actions_kd.py --teacher runs/teacher --student runs/warm --dataset train.csv \
        --source_column mr --target_column ref --templates templates.yaml --output_dir runs/all_actions

The teacher scores every token of the vocabulary anyway, so the immediate term of the policy gradient needs no sampled
action; the future does, with the weight `--future_weight`, a discount `--gamma`, or `--length_normalization`. MiniLLM
(Gu et al. 2024) is recipes/configs/methods/all_actions_kd/minillm.yaml. The derivation stands in
rlkd_trl/ops/all_actions.py.
"""

from pathlib import Path

from rlkd_trl.commands.distillation import distil
from rlkd_trl.commands.settings import DistillationSettings
from rlkd_trl.errors import run

DEMO_PRESET = Path(__file__).parent / "configs" / "demo_all_actions.yaml"


def main() -> None:
    # Parse, check, build, train, evaluate, save: the same for all methods of distillation.
    distil(
        recipe="all_actions_kd",
        config="rlkd_trl.trainers.full_vocabulary_config:AllActionsKDConfig",
        trainer="rlkd_trl.trainers.all_actions:AllActionsKDTrainer",
        title="all-actions policy gradient",
        kind=DistillationSettings,  # no flags for rewards
        description=__doc__,
        demo_preset=DEMO_PRESET,
    )


if __name__ == "__main__":
    run(main)
