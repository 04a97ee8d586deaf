"""Benchmarks of gptjax, alone and against PyTorch.

Input: a model preset and the current machine. Output: rates, times and peak memory,
also as fractions of measured device peaks. Read `suite` first.
"""
