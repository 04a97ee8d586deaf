"""The `gptjax` command.

Input: command-line arguments. Output: calls of the packages below, and an exit code.
Read `main` first; each command is imported when it runs.
"""
