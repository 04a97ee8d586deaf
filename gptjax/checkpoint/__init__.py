"""Verified checkpoints of a run.

Input: the training state. Output: step folders with a manifest of hashes, of which
only complete and unchanged ones are restored. Read `checkpoint` first.
"""
