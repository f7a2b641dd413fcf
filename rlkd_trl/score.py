"""Prints each token of a completion with the reward that a teacher gives it.

`rlkd-trl score` or `python -m rlkd_trl.score`; see rlkd_trl/commands/score.py.
"""

from rlkd_trl.commands.score import main
from rlkd_trl.errors import run

if __name__ == "__main__":
    run(main)
