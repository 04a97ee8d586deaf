"""Data pipeline: datasets -> readers -> text -> prepare -> token_files -> lm."""
