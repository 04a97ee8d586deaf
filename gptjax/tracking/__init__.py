"""Experiment trackers: TensorBoard, Weights & Biases and trackio.

Input: the files of a run. Output: its metrics, config, samples and pictures in a
tracker. Read `events` first, then `follow` and `process`.
"""
