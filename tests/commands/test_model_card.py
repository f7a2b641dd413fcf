"""What the model card of a run says of its settings."""

from types import SimpleNamespace

from rlkd_trl.commands.model_card import chosen_settings
from rlkd_trl.trainers.full_vocabulary_config import KDConfig

USUAL = {"learning_rate", "lr_scheduler_type", "per_device_train_batch_size", "gradient_accumulation_steps", "seed"}


def chosen_by(tmp_path, **changes) -> dict[str, object]:
    args = KDConfig(output_dir=str(tmp_path), max_steps=2, use_cpu=True, **changes)
    return chosen_settings(SimpleNamespace(args=args))


def test_the_usual_settings_alone_if_all_have_their_defaults(tmp_path):
    assert set(chosen_by(tmp_path)) == USUAL | {"max_steps", "steps_per_generation", "processes"}


def test_what_changes_the_student_but_not_where_and_how_often(tmp_path):
    changed = {
        "lr_scheduler_type": "cosine_with_restarts",
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "load_best_model_at_end": True,
        "metric_for_best_model": "bleu",
        "max_cpu_seconds": 60.0,
    }
    how_often = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "logging_steps": 7}
    chosen = chosen_by(tmp_path, **changed, **how_often)
    assert {name: chosen[name] for name in changed} == changed
    assert not how_often.keys() & chosen.keys()
