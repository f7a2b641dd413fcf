"""Students: policies to sample from and train, and models to start from scratch."""

from rlkd_trl.students.adapters import start_as_identity, target_modules, with_adapters
from rlkd_trl.students.policy import Policy, PolicyOutput, frozen_copy, log_probs_in_batches, remove_files_of_others

__all__ = [
    "Policy",
    "PolicyOutput",
    "frozen_copy",
    "log_probs_in_batches",
    "remove_files_of_others",
    "start_as_identity",
    "target_modules",
    "with_adapters",
]
