"""The recipes' flags, one dataclass per concern. The first line of a docstring is its heading in `--help`.

The type of a field says what its value is: a number with its range (`settings.ranges`), the path of something that is
read or written (`settings.files`).
"""

from rlkd_trl.commands.arguments.data import (
    DataArguments,
    HeldOutArguments,
    PromptArguments,
    StreamingArguments,
)
from rlkd_trl.commands.arguments.encoders import (
    EncoderHeldOutArguments,
    EncoderPanelArguments,
    EncoderStudentArguments,
    EncoderTeacherArguments,
    GeneralDataArguments,
    TaskDataArguments,
)
from rlkd_trl.commands.arguments.outputs import (
    CacheArguments,
    EvaluationArguments,
    GeneratedDataArguments,
    PseudoLabelArguments,
    RunArguments,
)
from rlkd_trl.commands.arguments.students import (
    AdapterArguments,
    NewModelArguments,
    StudentArguments,
)
from rlkd_trl.commands.arguments.teachers import (
    WEIGHTINGS,
    AbsentTeacherArguments,
    CodeArguments,
    PanelArguments,
    RewardArguments,
    RoutingArguments,
    ServerArguments,
    TeacherArguments,
)

__all__ = [
    "WEIGHTINGS",
    "AbsentTeacherArguments",
    "AdapterArguments",
    "CacheArguments",
    "CodeArguments",
    "DataArguments",
    "EncoderHeldOutArguments",
    "EncoderPanelArguments",
    "EncoderStudentArguments",
    "EncoderTeacherArguments",
    "EvaluationArguments",
    "GeneralDataArguments",
    "GeneratedDataArguments",
    "HeldOutArguments",
    "NewModelArguments",
    "PanelArguments",
    "PromptArguments",
    "PseudoLabelArguments",
    "RewardArguments",
    "RoutingArguments",
    "RunArguments",
    "ServerArguments",
    "StreamingArguments",
    "StudentArguments",
    "TaskDataArguments",
    "TeacherArguments",
]
