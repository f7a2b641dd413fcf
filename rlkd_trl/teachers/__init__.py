"""Teachers: load, freeze, score."""

from rlkd_trl.teachers.panel import Scorer, TeacherPanel
from rlkd_trl.teachers.scores import TeacherScores
from rlkd_trl.teachers.teacher import Teacher

__all__ = ["Scorer", "Teacher", "TeacherPanel", "TeacherScores"]
