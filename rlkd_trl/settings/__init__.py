"""What is known of settings wherever they are used (trainers, commands, the planner): ranges, files, declarations."""
