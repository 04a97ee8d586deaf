"""Model folders and weights of other tools.

Input: a model folder, run folder, hub name, or another tool's files. Output: a
`Model`, or the files that another tool reads. Read `model_folder` first, then `load`.
"""
