"""Benchmarks of gptjax, alone and against PyTorch. Read `suite` first."""
