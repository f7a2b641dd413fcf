"""What settings may be, whoever reads them: trainers, flags of commands, the planner."""
