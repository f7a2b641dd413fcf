"""Estimates how many bytes teacher, student and training take on each GPU, before anything is started.

`rlkd-trl plan` or `python -m rlkd_trl.plan`; see rlkd_trl/planning/command.py.
"""

from rlkd_trl.errors import run
from rlkd_trl.planning.command import main

if __name__ == "__main__":
    run(main)
