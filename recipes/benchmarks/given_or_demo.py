"""Data, templates and models of a benchmark: those that its flags name, or the embedded demo's."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlkd_trl.commands.arguments import DataArguments, PromptArguments, StudentArguments, TeacherArguments
from rlkd_trl.commands.checks import check_checkpoints, is_demo
from rlkd_trl.commands.data import load_prompts, load_templates
from rlkd_trl.commands.demo import use_demo_models
from rlkd_trl.prompts import PromptTemplates

if TYPE_CHECKING:
    from datasets import Dataset

_DEMO_TEMPLATES = ("builtin:data_to_text", ["facts_to_text", "tell_a_friend", "turn_into_sentence"])


@dataclass
class GivenOrDemo:
    """The flags for them."""

    data: DataArguments
    prompts: PromptArguments
    teacher: TeacherArguments
    student: StudentArguments

    def load_data(self) -> "tuple[PromptTemplates | None, Dataset]":
        """Templates and rows."""
        if self.teacher.teacher is None and self.prompts.templates is None:
            self.prompts.templates, self.prompts.template_names = _DEMO_TEMPLATES
        templates = load_templates(self.prompts)
        return templates, load_prompts(self.data, self.prompts, templates)

    def check_models(self, output_dir: str, *, seed: int) -> None:
        """Checks the models that are named; makes the demo's in `output_dir`, if none are."""
        if is_demo(self):
            use_demo_models(self, output_dir, seed=seed)
        check_checkpoints(self.teacher, self.student)
