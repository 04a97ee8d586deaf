"""Exports of models for other tools.

Input: a `Model`. Output: a folder in another tool's format, verified before it is kept.
Read `export` first.
"""
