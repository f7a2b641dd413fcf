"""`python -m rlkd_trl.plan`: what fits on the GPUs. See rlkd_trl/planning/command.py."""

from rlkd_trl.errors import run
from rlkd_trl.planning.command import main

if __name__ == "__main__":
    run(main)
