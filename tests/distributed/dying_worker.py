"""Two processes with a sharded teacher, of which the second is killed before it can help to score."""

import os
import signal
import sys
from pathlib import Path

import deepspeed
from accelerate import PartialState

from rlkd_trl.teachers import Teacher
from tests.teachers.test_teacher import score
from tests.tiny_models import MODELS, word_tokenizer

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

LAST_WORDS, WAITING, SURVIVED = "last_words", "waiting", "survived"


def main(output_dir: Path) -> None:
    state = PartialState(cpu=True)
    if state.is_main_process:
        MODELS["llama"]().save_pretrained(output_dir / "teacher")
        word_tokenizer().save_pretrained(output_dir / "teacher")
    state.wait_for_everyone()
    teacher = Teacher.from_pretrained(str(output_dir / "teacher"), placement="zero3")
    score(teacher)
    if not state.is_main_process:
        (output_dir / LAST_WORDS).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    (output_dir / WAITING).touch()
    score(teacher)
    (output_dir / SURVIVED).touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
