"""Generation, chat and classification with a trained model.

Input: a `Model` and prompts or texts. Output: completions, replies or class
probabilities. Read `generate` first, then `engine` and `sampling`.
"""
