"""The GPT as pure functions of (config, params, tokens).

Input: a `GPTConfig`, a parameter tree and token ids. Output: hidden states, logits and
KV caches. Read `gpt` first, then `layers` and `attention.mask`.
"""
