"""Metrics of a model on texts, labeled texts and instructions.

Input: a `Model` and data. Output: losses, accuracies and scores with confidence
intervals. Read `perplexity` first.
"""
