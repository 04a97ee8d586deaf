"""Attention: one function, several backends.

Input: queries, keys, values and an `AttentionMask`. Output: attention [B, T, H, K].
Read `mask` and `reference` first; `dispatch` selects the backend.
"""
