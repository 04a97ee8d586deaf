"""Process and device: settings before JAX starts, signals, timing, restarts.

Input: environment, devices and signals. Output: a configured process and its
measurements; nothing here knows about models or data. Read `preemption` first.
"""
