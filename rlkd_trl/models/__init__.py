"""What teacher and student have in common: a language model as prefix + continuation + LM head, and its vocabulary."""
