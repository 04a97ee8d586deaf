"""From files on disk to batches of NumPy arrays.

Input: text, tables, conversations or prepared token files, and a tokenizer. Output:
batches that are pure functions of (seed, step). Read `lm` first.
"""
