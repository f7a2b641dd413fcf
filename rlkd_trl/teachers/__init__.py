"""Teachers: load, freeze, score."""

from rlkd_trl.teachers.absent import AbsentTeacher
from rlkd_trl.teachers.panel import Scorer, TeacherPanel
from rlkd_trl.teachers.scores import TeacherScores
from rlkd_trl.teachers.teacher import Teacher

__all__ = ["AbsentTeacher", "Scorer", "Teacher", "TeacherPanel", "TeacherScores"]
