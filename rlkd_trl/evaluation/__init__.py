"""Evaluation: outputs, their metrics, and the report of a run."""
