"""Meshes, shardings and processes.

Input: a mesh config and parameter names. Output: shardings and arrays placed by them.
Read `sharding` first.
"""
