"""Loss, train step and the training loop.

Input: a `RunConfig` and a `Task`. Output: the trained state, checkpoints and
metrics.jsonl. Read `train_step` first, then `task` and `trainer`.
"""
