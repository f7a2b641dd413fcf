"""The on-policy loop with its PPO, RLOO and REINFORCE forms, and supervised training. Import from the modules."""
