"""File input and output with limits and verification.

Input: paths and URLs. Output: parsed values and files that are complete or absent.
Read `strict_json` first.
"""
