"""rlkd_trl: reinforcement-learning knowledge distillation for encoder-decoder and decoder-only language models."""

__version__ = "0.1.0"
