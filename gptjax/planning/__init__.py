"""Cost of a run before it starts.

Input: a `RunConfig` and a topology. Output: parameters, FLOPs, memory per device,
collectives, and whether it fits. Read `plan` first.
"""
