"""Benchmarks of gptjax on the current machine.

Input: a model preset. Output: rates, times and peak memory, also as fractions of
measured device peaks. `suite` is `gptjax bench`; `device` is `gptjax bench --device`.
"""
