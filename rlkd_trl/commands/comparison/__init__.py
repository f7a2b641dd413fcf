"""Methods side by side on one budget: which runs there are, running them, testing them, and the tables."""
