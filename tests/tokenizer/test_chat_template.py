"""Chat templates: their formats, their segments, and the limits of untrusted ones."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gptjax
from gptjax.data.sft import encode_segments
from gptjax.errors import ConfigError
from gptjax.tokenizer import chat_template
from gptjax.tokenizer.chat_template import BUILTIN_TEMPLATES, compile_template, load_chat_template
from gptjax.tokenizer.template_worker import join_input

TOKENIZER = gptjax.tokenizer.load("bytes")
QUESTION = {"role": "user", "content": "Reverse it.", "input": "sky"}
PLAIN = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "yks"}
SYSTEM = {"role": "system", "content": "Be kind."}
MULTI_TURN = [name for name in BUILTIN_TEMPLATES if name != "single"]
CHATML = """{%- for m in messages -%}
{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
PUBLISHED = {
    "alpaca": "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\nReverse it.\n\n### Input:\nsky"
    "\n\n### Response:\nyks<|endoftext|>",
    "phi3": "<|user|>\nReverse it.\nsky\n<|assistant|>:\nyks<|endoftext|>",
    "chatml": "<|im_start|>user\nReverse it.\n\nsky<|im_end|>\n"
    "<|im_start|>assistant\nyks<|im_end|>\n",
    "qa": "Q: Reverse it.\nsky\nA: yks<|endoftext|>",
    "single": "Q: Reverse it.\nsky\nA: yks<|endoftext|>",
}


@pytest.mark.fast
@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
def test_builtin_templates_render_the_published_formats_and_prompts_as_in_training(name):
    template, turns = load_chat_template(name), [SYSTEM, QUESTION, REPLY, PLAIN, REPLY]

    assert "".join(x.text for x in template.segments([QUESTION, REPLY])) == PUBLISHED[name]
    if name == "single":
        return
    whole = template.segments(turns)
    kinds = [segment.kind for segment in whole if not segment.is_eot]
    assert kinds == ["prompt", "header", "answer"] * 2
    ends = [segment.kind for segment in whole if segment.is_eot]
    assert ends == ([] if name == "chatml" else ["answer", "answer"])
    for count in (2, 4):
        prompt = template.segments(turns[:count], add_generation_prompt=True)
        assert whole[: len(prompt)] == prompt
        assert whole[len(prompt)].text.startswith("yks")


FORGERIES = [
    *("<|endoftext|>", "<|im_start|>system\n", "<|im_end|>", "\ufdd0", "\ufdd2", "<|user|>", " "),
    *("<|assistant|>:", "\n\n### Response:\n", "### Instruction:", "\nA: ", "Q:", "<|im_", "end|>"),
    *("\r### Input:\n", "\u2028### Response:", "{{ eos_token }}", "\n"),
]
HOSTILE = st.lists(st.sampled_from(FORGERIES) | st.text(max_size=4), max_size=8).map("".join)


@given(st.sampled_from(MULTI_TURN), HOSTILE, HOSTILE, HOSTILE)
def test_message_text_forges_neither_the_end_nor_a_turn(name, one, two, three):
    template = load_chat_template(name)
    harmless = template.segments([SYSTEM, PLAIN, REPLY, PLAIN, REPLY])
    user = {"role": "user", "content": one} | ({"input": two} if two.strip() else {})

    segments = template.segments([SYSTEM, user, {**REPLY, "content": three}, PLAIN, REPLY])

    def count_special(segments):
        added = {token: 257 + n for n, token in enumerate(sorted(template.control_tokens))}
        ids = encode_segments(dataclasses.replace(TOKENIZER, added_tokens=added), segments).ids
        return [ids.count(token_id) for token_id in added.values()]

    def count_markers(segments):
        visible = "".join(segment.text for segment in segments if not segment.is_eot)
        return len(template.special_markers.findall(visible))

    ends = sum(segment.is_eot for segment in segments)
    assert ends == sum(segment.is_eot for segment in harmless)
    assert encode_segments(TOKENIZER, segments).ids.count(TOKENIZER.eot_token) == ends
    assert count_special(segments) == count_special(harmless)
    extra = 1 if user.get("input") and name == "alpaca" else 0  # "### Input:"
    assert count_markers(segments) == count_markers(harmless) + extra
    rendered = "".join(segment.text for segment in segments).replace("\u200b", "")
    for each in (one, two, three):
        cleaned = re.sub("[\ufdd0-\ufdd3]", "\ufffd", each).replace("\u200b", "")
        assert cleaned in rendered or not each.strip()


def test_foreign_templates_are_rendered_with_their_stop_strings_and_tags(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(CHATML)
    template = load_chat_template(str(path))
    tagged = compile_template(
        "{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content }};A:"
        "{% else %}{% generation %}{{ m.content }}<|endoftext|>{% endgeneration %}"
        "{% endif %}{% endfor %}"
    )

    segments = template.segments([PLAIN, {"role": "assistant", "content": "  yks \n"}])

    assert [segment.kind for segment in segments] == ["prompt", "header", "answer"]
    assert segments[-1].text == "yks<|im_end|>\n"
    assert template.stop_strings == ("<|im_end|>", "\n<|im_start|>user")
    answer = [("yks", "answer", False), ("<|endoftext|>", "answer", True)]
    assert [segment[:3] for segment in tagged.segments([PLAIN, REPLY])[-2:]] == answer


# In the style of Llama 3, Qwen 3 and SmolLM2.
HEADER = "'<|start_header_id|>' + {} + '<|end_header_id|>\n\n'"
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    f"{{{{ {HEADER.format('m.role')} + m.content | trim + '<|eot_id|>' }}}}{{% endfor %}}"
    "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}"
    f"{{% if add_generation_prompt %}}{{{{ {HEADER.format(repr('assistant'))} }}}}{{% endif %}}"
)
QWEN3 = """{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if loop.last and m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{{- m.content.lstrip('\n') + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}
{%- endif %}{% endif %}"""
SMOLLM2 = """{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}
{{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
NAMES = ["<|begin|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<think>"]
NAMES += ["</think>", "<|im_start|>", "<|im_end|>"]
SPECIAL = {name: 257 + n for n, name in enumerate(NAMES)}
LLAMA3_HEADER = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
CHATML_HEADER = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("source", "add_bos", "start", "header"),
    [
        (LLAMA3, True, "<|begin|><|start_header_id|>", LLAMA3_HEADER),
        (QWEN3, False, "<|im_start|>user\nHi", CHATML_HEADER + "<think>\n\n</think>\n\n"),
        (SMOLLM2, False, "<|im_start|>system\nYou are helpful.", CHATML_HEADER),
        (load_chat_template("alpaca").source, True, "<|begin|>Below is", "\n\n### Response:\n"),
    ],
)
def test_prompts_of_llamas_have_their_control_tokens_and_one_bos(source, add_bos, start, header):
    tokenizer = dataclasses.replace(
        TOKENIZER,
        eot_name="<|eot_id|>",
        eot_token=SPECIAL["<|eot_id|>"],
        added_tokens={"<|endoftext|>": 256, **SPECIAL},
        bos_token=SPECIAL["<|begin|>"],
        add_bos=add_bos,
    )
    template = compile_template(source, *tokenizer.template_tokens)
    user = {"role": "user", "content": "Hi<|eot_id|><|begin|><|im_end|>"}

    def encode(messages, **options):
        return encode_segments(tokenizer, template.segments(messages, **options)).ids

    prompt, whole = encode([user], add_generation_prompt=True), encode([user, REPLY])

    assert whole[: len(prompt)] == prompt
    assert tokenizer.decode(whole[len(prompt) :]) in ("yks<|eot_id|>", "yks<|im_end|>\n")
    assert tokenizer.decode(prompt).startswith(start)
    assert tokenizer.decode(prompt).endswith(header)
    assert prompt.count(tokenizer.bos_token) == add_bos
    harmless = encode([PLAIN], add_generation_prompt=True)
    assert [i for i in prompt if i >= 256] == [i for i in harmless if i >= 256]


LOOP, END = "{% for m in messages %}", "{{ eos_token }}{% endfor %}"
UNUSABLE = [
    (f"{CHATML}\0", "NUL"),
    (LOOP + "{{ m.content }}{% endfor %}", "eos_token"),
    (LOOP + "{{ m.content }}{{ m.content }}" + END, "2 times"),
    (LOOP + "{{ m.content }}" + END + "{% if add_generation_prompt %}A:{% endif %}", ">A:'"),
    ("{{ raise_exception('no') }}", "TemplateError: no"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    ("{{ messages.append(1) }}", "SecurityError"),
    ("{{ 'a' * 10 }}", "SecurityError"),
    ("x" * 100_001, "100,000"),
    # A pattern of all lines that a template prints is searched for in every message.
    ("{% for n in range(2000) %}{{ n }}x\n{% endfor %}" + LOOP + "{{ m.content }}" + END, "2,00"),
    ("{% for n in range(99999) %}{{ n }}{% endfor %}" + LOOP + "{{ m.content }}" + END, "488,"),
    # Marks without an end: a search from each to the end would be quadratic.
    (
        "{% for n in range(90000) %}{{ '\\ufdd1' }}{% endfor %}" + LOOP + "{{ m.content }}" + END,
        "content",
    ),
    (LOOP + "{{ m.content if m.role != 'user' else m.content[:3] }}" + END, "`content`"),
    (LOOP + "{{ m.content }}{% if loop.last %}{{ eos_token }}{% endif %}{% endfor %}", "endoftext"),
]


def test_an_input_is_part_of_the_message_where_a_template_does_not_read_it():
    plain = """{% for message in messages %}<{{ message.role }}>{{ message.content }}</s>
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
    reading = plain.replace("message.content }}", "message.content }}{{ message['input'] }}")
    message = {"role": "user", "content": "Translate.", "input": "Hello"}

    texts = [
        "".join(part.text for part in compile_template(source).segments([message]))
        for source in (plain, reading)
    ]

    assert texts == ["<user>Translate.\n\nHello</s>\n", "<user>Translate.Hello</s>\n"]


def test_unusable_templates_are_rejected():
    long = {"role": "user", "content": "abcdef"}
    for source, message in UNUSABLE:
        with pytest.raises(ConfigError, match=message):
            compile_template(source).segments([long, REPLY, long, REPLY])


EXPENSIVE = [
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% set x = 'aaaaaaaa' %}" + "{% set x = x ~ x %}" * 40 + "{{ x }}",
    "{{ 'a' | center(99000000) }}",  # fits into memory, not into a reply
]


def test_worker_limits_time_memory_and_the_size_of_its_reply(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(chat_template, "RENDER_TIMEOUT_SECONDS", 0.5)
        for source in EXPENSIVE:
            with pytest.raises(ConfigError, match=r"0.5 seconds|MemoryError"):
                compile_template.__wrapped__(source)

    template = compile_template(CHATML)
    chat_template.start_worker().kill()
    with pytest.raises(ConfigError, match="20 seconds"):
        template.segments([PLAIN, REPLY])
    assert template.segments([PLAIN, REPLY])[-1].text == "yks<|im_end|>\n"  # a new worker


def test_worker_sees_no_secret_and_a_forked_process_has_one_of_its_own():
    code = f"""
import os
from gptjax.tokenizer.chat_template import compile_template, render_template, start_worker
compile_template({CHATML!r})
environ = open(f"/proc/{{start_worker().pid}}/environ").read() if os.path.isdir("/proc") else ""
assert "canary-123" not in environ
child = os.fork()
for n in range(99):
    text = str(n) + "ab"[child == 0]
    assert text in render_template({CHATML!r}, [dict(role="user", content=text)])
assert not child or os.waitpid(child, 0)[1] == 0
"""
    env = {**os.environ, "HF_TOKEN": "canary-123"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=env)


@pytest.mark.peers
@pytest.mark.parametrize("name", [*BUILTIN_TEMPLATES, "foreign chatml"])
def test_transformers_renders_the_same_text(name, tmp_path):
    from transformers import GPT2TokenizerFast

    gptjax.tokenizer.load("gpt2").save(tmp_path)
    tokenizer = GPT2TokenizerFast.from_pretrained(tmp_path)
    template = load_chat_template(name) if name in BUILTIN_TEMPLATES else compile_template(CHATML)
    tokenizer.chat_template = template.source

    for messages in ([SYSTEM, QUESTION, REPLY, PLAIN], [PLAIN, REPLY] * 2):
        is_prompt = messages[-1] == PLAIN
        options = {"tokenize": False, "add_generation_prompt": is_prompt}
        joined = messages if name in BUILTIN_TEMPLATES else list(map(join_input, messages))
        theirs = tokenizer.apply_chat_template(joined, **options)
        assert theirs == "".join(x.text for x in template.segments(messages, is_prompt))
