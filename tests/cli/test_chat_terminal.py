"""Chatting in a real terminal, where keys go in and text appears, and in a pipe."""

import dataclasses
import io
import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gptjax
from gptjax.cli import chat
from gptjax.errors import DataError
from gptjax.inference.generate import complete
from gptjax.tokenizer.chat_template import load_chat_template
from tests.cli.test_chat import ASSISTANT, BASE, one_per_character, user
from tests.small_models import make_model

pty = pytest.importorskip("pty", reason="there are no pseudo-terminals here")
termios = pytest.importorskip("termios")

SECONDS = 120  # until what is waited for counts as missing
READY = b"\x1b[?2004h"  # prompt_toolkit waits for keys from here on
INTERRUPT, END = b"\x03", b"\x04"
CHILD = r"""
import fcntl, termios, time
from pathlib import Path
from types import SimpleNamespace

fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C is a signal from here on

from gptjax.cli import chat

class Straw(SimpleNamespace):
    def __str__(self):
        return "GPT of straw"

def stream_answer(model, messages, **sampling):
    text = messages[-1]["content"]
    if text == "gate":
        yield "before the gate, "
        while not Path("gate").exists():
            time.sleep(0.01)
        yield "after the gate"
    elif text == "slow":
        while True:
            yield "on and "
            time.sleep(0.01)
    elif text == "evil":
        yield "\x1b]52;c;"
        yield "ZXZpbA==\x07\x1b[2J\x9b2J\u202eevil"
    else:
        yield f"<<{text!r} is message "
        yield f"{len(messages)}>>"

chat.stream_answer = stream_answer
chat.encode_chat = lambda model, messages: "".join(m["content"] for m in messages)
config = SimpleNamespace(context_length=200)
chat.run_chat(Straw(labels=(), chat_template="any", config=config), "straw", {})
"""


class Terminal:
    """A chat in a terminal of its own, and all that appeared in it."""

    def __init__(self, folder):
        self.main, side = pty.openpty()
        termios.tcsetwinsize(side, (24, 80))
        # Or else a Ctrl-C throws away what the child wrote and nobody read so far.
        attributes = termios.tcgetattr(side)
        attributes[3] |= termios.NOFLSH
        termios.tcsetattr(side, termios.TCSANOW, attributes)
        here = {"PYTHONPATH": str(Path(gptjax.__file__).parent.parent)}
        plain = {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "PYTHONUTF8": "1"}
        self.child = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            cwd=folder,
            env=os.environ | here | plain,
            stdin=side,
            stdout=side,
            stderr=side,
            start_new_session=True,
        )
        os.close(side)
        self.seen, self.at = b"", 0

    def press(self, keys):
        os.write(self.main, keys.encode() if isinstance(keys, str) else keys)

    def until(self, text):
        """What appears up to this text, after what was waited for before."""
        text = text.encode() if isinstance(text, str) else text
        deadline = time.monotonic() + SECONDS
        while (found := self.seen.find(text, self.at)) < 0:
            ready, _, _ = select.select([self.main], [], [], 1)
            try:
                more = os.read(self.main, 65536) if ready else b""
            except OSError:  # Linux's way to say that the child is gone
                raise AssertionError(f"{text} is not in {self.seen[self.at :]}") from None
            self.seen += more
            assert time.monotonic() < deadline, (text, self.seen[self.at :])
        start, self.at = self.at, found + len(text)
        return self.seen[start : self.at]

    def enter(self, line):
        """Sends a line and waits for the answer's end; what appeared meanwhile."""
        self.press(f"{line}\r")
        return self.until(READY).decode()

    def close(self):
        self.child.kill()
        self.child.wait()
        os.close(self.main)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chat")


@pytest.fixture(scope="module")
def shared(folder):
    """One terminal for several tests; starting takes seconds."""
    terminal = Terminal(folder)
    terminal.until(READY)
    yield terminal
    terminal.close()


@pytest.fixture
def terminal(shared):
    """The terminal, at the start of a conversation."""
    assert "(dropped all turns)" in shared.enter("/reset")
    return shared


def test_the_first_line_says_what_answers_and_how_to_leave(shared):
    header = shared.seen.split(b"\r\n")[0].decode()

    assert header.startswith("straw: GPT of straw. /help")
    assert "/quit or Ctrl-D" in header


def test_pieces_appear_before_the_answer_is_complete(terminal, folder):
    terminal.press("gate\r")

    terminal.until("before the gate, ")
    assert b"after the gate" not in terminal.seen
    (folder / "gate").touch()
    terminal.until("after the gate")
    terminal.until(READY)


def test_pasted_lines_are_one_message(terminal):
    terminal.press("\x1b[200~line one\n  line two\r\nline three\x1b[201~")
    terminal.until("line three")

    assert r"<<'line one\n  line two\nline three' is message 1>>" in terminal.enter("")


@pytest.mark.parametrize("text", ["é", "漢字かな", "😀", "a é 漢字 😀 z"])
def test_text_of_any_language_goes_in_and_out_unchanged(terminal, text):
    assert f"<<{text!r} is message 1>>" in terminal.enter(text)


def test_lines_can_be_edited_and_come_back(terminal):
    left, up = "\x1b[D", "\x1b[A"

    assert "<<'abc' is" in terminal.enter(f"bcx\x7f{left}{left}a")
    assert "<<'abcd' is" in terminal.enter(f"{up}d")


def test_what_a_model_writes_does_nothing_to_the_terminal(terminal):
    shown = terminal.enter("evil")

    answer = shown.split("\x1b[?2004l")[1].split("\r\n")[0]
    assert answer == "\ufffd]52;c;ZXZpbA==\ufffd\ufffd[2J\ufffd2J\ufffdevil"
    assert b"\x1b]52" not in terminal.seen
    assert b"\x1b[2J" not in terminal.seen


def test_an_interrupt_ends_the_answer_and_not_the_chat(terminal):
    terminal.press("slow\r")
    terminal.until("on and on and ")
    terminal.press(INTERRUPT)
    terminal.until("(stopped)\r\n")
    terminal.until(READY)

    # Both the question and what there was of its answer are kept.
    assert "<<'next' is message 3>>" in terminal.enter("next")


def test_no_number_of_interrupts_ends_the_chat(terminal):
    for _ in range(3):
        terminal.press("slow\r")
        terminal.until("on and on and ")
        for _ in range(9):
            terminal.press(INTERRUPT)
            time.sleep(0.002)  # some come in the answer, some at the prompt
        terminal.until("(stopped)\r\n")
        terminal.press("still there\r")
        terminal.until("<<'still there' is message ")
        terminal.until(READY)


def test_an_interrupt_at_the_prompt_clears_the_line_and_once_says_how_to_leave(terminal):
    for _ in range(2):
        terminal.press("wrong")
        terminal.until("wrong")
        terminal.press(INTERRUPT)
        terminal.until(READY)

    assert "<<'right' is message 1>>" in terminal.enter("right")
    assert terminal.seen.count(b"(/quit or Ctrl-D quits)") == 1


def test_what_was_said_long_ago_is_forgotten_with_a_remark(terminal):
    assert "is message 1>>" in terminal.enter("x" * 20)
    assert "is message 3>>" in terminal.enter("y" * 10)
    shown = terminal.enter("z" * 20)

    assert "(dropped the first 1 turn: the context of 200 tokens is full)" in shown
    assert "is message 3>>" in shown
    assert "at most 100 fit" in terminal.enter("x" * 101)


def test_a_wrong_command_is_a_remark(terminal):
    assert "Did you mean /retry?" in terminal.enter("/rety")
    assert "<<'x' is message 1>>" in terminal.enter("x")


@pytest.mark.parametrize("keys", [b"/quit\r", END])
def test_leaving_is_success(folder, keys):
    terminal = Terminal(folder)
    try:
        terminal.until(READY)
        terminal.press(keys)
        assert terminal.child.wait(SECONDS) == 0
    finally:
        terminal.close()


def piped(monkeypatch, text, encoding="utf-8"):
    """Puts the text where stdin is."""
    stream = io.TextIOWrapper(io.BytesIO(text.encode(encoding)), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stream)


def test_from_a_pipe_each_line_is_a_message_and_answers_go_to_stdout(monkeypatch, capsys):
    def echo(model, messages, **sampling):
        return iter([messages[-1]["content"], "\x1b[2J!"])

    monkeypatch.setattr(chat, "stream_answer", echo)
    monkeypatch.setattr(chat, "encode_chat", one_per_character)
    piped(monkeypatch, "é\r\n\n漢字\n/wrong\nlast")

    chat.run_chat(ASSISTANT, "a\x1b[2Jname", {"max_new_tokens": 2})

    out, err = capsys.readouterr()
    assert out == "é\ufffd[2J!\n漢字\ufffd[2J!\nlast\ufffd[2J!\n"
    header, remark = err.splitlines()
    assert header.startswith(f"a\ufffd[2Jname: {BASE}. /help")
    assert "there is no command /wrong" in remark


def test_an_answer_is_written_before_the_next_line_is_read(monkeypatch, capsys):
    written = []

    class Lines:
        isatty = staticmethod(lambda: False)

        def __iter__(self):
            for line in ("a\n", "b\n"):
                yield line
                written.append(capsys.readouterr().out)

    monkeypatch.setattr(chat, "stream", lambda model, text, **sampling: iter(text))
    monkeypatch.setattr(sys, "stdin", Lines())

    chat.run_chat(BASE, "name", {})

    assert written == ["a\n", "b\n"]


def test_messages_that_are_no_text_are_refused(monkeypatch):
    piped(monkeypatch, "é", encoding="latin-1")

    with pytest.raises(DataError, match=r"not UTF-8: .*Convert them to UTF-8"):
        chat.run_chat(ASSISTANT, "name", {})


def test_an_output_that_lacks_characters_gets_question_marks():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")

    chat.make_printer(file)("aé漢\x1b\n")

    assert file.buffer.getvalue() == b"a???\n"


def test_a_base_model_writes_what_generation_writes(monkeypatch, capsys):
    options = {"max_new_tokens": 20, "temperature": 1.0}
    piped(monkeypatch, "to be\nor not\n")

    chat.run_chat(BASE, "name", options)

    out, err = capsys.readouterr()
    results = [
        complete(BASE, text, **options, seed=seed)[0].text
        for seed, text in enumerate(["to be", "or not"])
    ]
    assert out == "".join(chat.sanitize(f"{text}\n") for text in results)
    assert "completes text: each line is a separate prompt" in err


def test_an_assistant_with_a_real_template_answers_until_its_context_is_full(monkeypatch, capsys):
    source = load_chat_template("chatml").source
    model = dataclasses.replace(make_model(context_length=128, n_layers=1), chat_template=source)
    piped(monkeypatch, "first\nsecond\n" + "x" * 128)

    chat.run_chat(model, "name", {"max_new_tokens": 12})

    out, err = capsys.readouterr()
    first = chat.stream_answer(model, [user("first")], max_new_tokens=12, seed=0)
    second = chat.stream_answer(model, [user("second")], max_new_tokens=12, seed=1)
    assert out == chat.sanitize("".join([*first, "\n", *second, "\n"]))
    assert "(dropped the first 1 turn: the context of 128 tokens is full)" in err
    assert "at most 116 fit: 12 of the context's 128" in err
