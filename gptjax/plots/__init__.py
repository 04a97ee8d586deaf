"""Figures and reports of runs, tokens and models.

Input: metrics, tokens or a model. Output: Matplotlib figures, report.md and HTML
pages. Read `curves` first.
"""
