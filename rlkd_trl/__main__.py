"""`python -m rlkd_trl COMMAND`: the console command `rlkd-trl`. See rlkd_trl/commands/console.py."""

from rlkd_trl.commands.console import main

if __name__ == "__main__":
    main()
