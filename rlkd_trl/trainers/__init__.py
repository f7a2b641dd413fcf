"""The on-policy loop with its PPO and RLOO forms, and supervised training. Import from `rlkd_trl` or the modules."""
