r"""Distillation without reinforcement learning: word level, sequence level, GKD, f-distill, DistiLLM, Hinton.

    accelerate launch recipes/kd.py                                        # the embedded demo, no network
    accelerate launch recipes/kd.py --config recipes/configs/gkd_glm_9b_glm_1_5b.yaml
    accelerate launch recipes/kd.py --teacher runs/teacher --student runs/warm --dataset runs/pseudo.jsonl \
        --source_column mr --target_column pseudo_label --templates templates.yaml --output_dir runs/kd

A divergence (`--divergence`) between the teacher's and the student's next-token distributions, over the whole
vocabulary, at every token of sequences that are the data's targets, fresh samples of the teacher (`--sequences`) or,
with probability `--lmbda`, samples of the student; mixed with the cross-entropy of the targets by `--alpha`. The
methods of the literature are settings of these: see recipes/configs/methods/kd/, one file per method with its paper.
Where this differs from the papers stands on `KDTrainer`.
"""

from pathlib import Path

from rlkd_trl.commands.distillation import distil
from rlkd_trl.commands.settings import DistillationSettings
from rlkd_trl.errors import run

DEMO_PRESET = Path(__file__).parent / "configs" / "demo_kd.yaml"


def main() -> None:
    # Parse, check, build, train, evaluate, save: the same for all methods of distillation.
    distil(
        recipe="kd",
        config="rlkd_trl.trainers.full_vocabulary_config:KDConfig",
        trainer="rlkd_trl.trainers.kd:KDTrainer",
        title="distillation on divergences",
        kind=DistillationSettings,  # no flags for rewards
        description=__doc__,
        demo_preset=DEMO_PRESET,
    )


if __name__ == "__main__":
    run(main)
