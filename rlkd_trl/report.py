"""One report of several runs, rebuilt from their logs, and their curves as PNG files.

`rlkd-trl report RUN RUN` or `python -m rlkd_trl.report RUN RUN`; see rlkd_trl/commands/report.py.
"""

from rlkd_trl.commands.report import main
from rlkd_trl.errors import run

if __name__ == "__main__":
    run(main)
