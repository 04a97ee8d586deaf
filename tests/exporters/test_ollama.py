"""Modelfiles: Go's text/template renders them as the chat template of the model."""

import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import subprocess

import pytest

from gptjax.cli.main import main
from gptjax.errors import ModelError
from gptjax.exporters.ollama import find_turn_texts, go_template, modelfile, quote_go
from gptjax.tokenizer.chat_template import BUILTIN_TEMPLATES, compile_template, load_chat_template
from gptjax.weights.model_folder import save
from tests.small_models import make_model
from tests.tokenizer.test_chat_template import CHATML
from tests.tokenizer.test_vocab_files import BOS, LLAMA

TEMPLATES = [name for name in BUILTIN_TEMPLATES if name != "single"]
DEFAULT_SYSTEM = """{% if messages[0].role != 'system' %}<|im_start|>system
Be kind.<|im_end|>
{% endif %}"""
RENDERER = """
package main

import (
	"encoding/json"
	"os"
	"text/template"
)

type Message struct{ Role, Content string }

func main() {
	var job struct {
		Template string
		Chats    [][]Message
	}
	json.NewDecoder(os.Stdin).Decode(&job)
	parsed := template.Must(template.New("").Parse(job.Template))
	for _, chat := range job.Chats {
		parsed.Execute(os.Stdout, map[string]any{"Messages": chat})
		os.Stdout.WriteString("\\x00")
	}
}
"""


def draw_chats(count):
    """Conversations that end with a question."""
    draw = random.Random(0)
    texts = ["Hi", "A list\n\n- a", '"quoted" {{ .Role }}', "äöü 漢字 🙂", "a\\nb"]
    for n in range(count):
        roles = ["system"] * (n % 2) + ["user", "assistant"] * (n % 4) + ["user"]
        yield [{"role": role, "content": draw.choice(texts)} for role in roles]


def load(name):
    return (
        compile_template(DEFAULT_SYSTEM + CHATML) if name == "SmolLM" else load_chat_template(name)
    )


def render(template, messages):
    segments = template.segments(messages, add_generation_prompt=True)
    return "".join(segment.text for segment in segments)


@pytest.mark.parametrize("name", [*TEMPLATES, "SmolLM"])
def test_the_texts_between_messages_make_up_the_template(name):
    template = load(name)

    texts = find_turn_texts(template)

    for messages in draw_chats(20):
        assert texts.render(messages) == render(template, messages)


@pytest.mark.parametrize("name", [*TEMPLATES, "SmolLM"])
def test_go_renders_the_same_text(name, tmp_path):
    if not shutil.which("go"):
        pytest.skip("Go is not installed: apt-get install golang-go")
    (tmp_path / "main.go").write_text(RENDERER)
    template, chats = load(name), list(draw_chats(20))
    job = {"Template": go_template(find_turn_texts(template)), "Chats": chats}
    env = {**os.environ, "HOME": str(tmp_path)}  # of Go's cache

    run = subprocess.run(
        ["go", "run", "main.go"],
        input=json.dumps(job).encode(),
        cwd=tmp_path,
        env=env,
        check=True,
        capture_output=True,
    )

    rendered = run.stdout.decode().split("\0")[:-1]
    assert rendered == [render(template, messages) for messages in chats]


def test_a_template_that_reads_more_than_two_messages_is_rejected():
    number = "(loop.index if m['role'] == 'user' else '')"
    numbered = CHATML.replace("m['role']", f"(m['role'] ~ {number})")

    for template in (load_chat_template("single"), compile_template(numbered)):
        with pytest.raises(ModelError, match="--to gguf"):
            find_turn_texts(template)


def test_a_modelfile_has_the_template_stops_and_context_of_the_model(tmp_path, capsys):
    template = load_chat_template("chatml").source
    model = dataclasses.replace(make_model(), chat_template=template)
    save(model, tmp_path / "model")

    assert main(["export", f"{tmp_path}/model", "--to", "ollama", "--out", f"{tmp_path}/out"]) == 0

    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text == modelfile(model, "model-f16.gguf")
    assert text.startswith('FROM ./model-f16.gguf\nTEMPLATE """{{')
    assert text.splitlines()[1].endswith('}}"""')
    assert (tmp_path / "out" / "model-f16.gguf").is_file()
    assert "PARAMETER num_ctx 8\n" in text
    assert 'PARAMETER stop """<|im_end|>"""\n' in text


def test_every_character_of_a_quoted_text_is_printable():
    text = "".join(map(chr, itertools.chain(range(160), (0x200B, 0x1F642))))

    assert quote_go(text).isprintable()


def test_the_bos_token_that_ollama_adds_is_not_in_the_template_as_well():
    model = dataclasses.replace(
        make_model(tokenizer=LLAMA), chat_template="{{ bos_token }}" + CHATML
    )
    other = dataclasses.replace(model.tokenizer, add_bos=False)

    assert BOS not in modelfile(model, "x.gguf")
    assert f'"{BOS}<|im_start|>' in modelfile(dataclasses.replace(model, tokenizer=other), "x.gguf")


def test_all_end_tokens_of_a_model_are_stop_texts():
    text = modelfile(make_model(tokenizer=LLAMA), "x.gguf")

    assert re.findall('PARAMETER stop """(.*)"""', text) == ["<|end_of_text|>", "<|eot_id|>"]
