"""Complete training jobs, one module per kind of training.

Input: a `RunConfig` and a run folder. Output: a trained `Model`, its metrics and its
report. Read `pretrain` first.
"""
