"""Chat in a real terminal: keys go in, and text appears."""

import os
import select
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

pty = pytest.importorskip("pty", reason="there are no pseudo-terminals here")
termios = pytest.importorskip("termios")

SECONDS = 120  # to wait for an output
READY = "\x1b[?2004h"  # prompt_toolkit waits for keys from here on
INTERRUPT, END = "\x03", "\x04"
CHILD = r"""
import fcntl, termios, time
from pathlib import Path
from types import SimpleNamespace

fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C is a signal from here on

from gptjax.cli import chat

def stream_answer(model, messages, **sampling):
    text = messages[-1]["content"]
    if text == "gate":
        yield "before the gate, "
        while not Path("gate").exists():
            time.sleep(0.01)
        yield "after the gate"
    while text == "slow":
        yield "on and "
        time.sleep(0.01)
    if text == "evil":
        yield "\x1b]52;c;"
        yield "ZXZpbA==\x07\x1b[2J\x9b2J\u202eevil"
    yield f"<<{text!r} is message {len(messages)}>>"

chat.stream_answer = stream_answer
chat.encode_chat = lambda model, messages: "".join(m["content"] for m in messages)
config = SimpleNamespace(context_length=200)
chat.run_chat(SimpleNamespace(labels=(), chat_template="any", config=config), "fake", {})
"""


class Terminal:
    """A chat in a terminal of its own, and all text that appeared in it."""

    def __init__(self, folder):
        self.main, side = pty.openpty()
        termios.tcsetwinsize(side, (24, 80))
        # Otherwise a Ctrl-C discards output that was not read yet.
        attributes = termios.tcgetattr(side)
        attributes[3] |= termios.NOFLSH
        termios.tcsetattr(side, termios.TCSANOW, attributes)
        plain = {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "PYTHONUTF8": "1"}
        self.child = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | plain,
            **dict.fromkeys(("stdin", "stdout", "stderr"), side),
            start_new_session=True,
        )
        os.close(side)
        self.seen, self.at, self.gate = b"", 0, folder / "gate"

    def press(self, keys):
        os.write(self.main, keys.encode())

    def until(self, text):
        """Waits for a text; returns what appeared since the last one."""
        deadline = time.monotonic() + SECONDS
        while (found := self.seen.find(text.encode(), self.at)) < 0:
            if select.select([self.main], [], [], 1)[0]:
                self.seen += os.read(self.main, 65536)  # OSError: the child is gone
            assert time.monotonic() < deadline, (text, self.seen[self.at :])
        start, self.at = self.at, found + len(text.encode())
        return self.seen[start : self.at].decode()

    def enter(self, line):
        """Sends a line; returns what appeared until the next prompt."""
        self.press(f"{line}\r")
        return self.until(READY)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One terminal for all tests; starting takes seconds."""
    terminal = Terminal(tmp_path_factory.mktemp("chat"))
    terminal.until(READY)
    yield terminal
    terminal.child.kill()
    terminal.child.wait()
    os.close(terminal.main)


@pytest.fixture
def terminal(shared):
    """The terminal, at the start of a conversation."""
    assert "(dropped all turns)" in shared.enter("/reset")
    return shared


def test_chunks_appear_before_the_reply_is_complete(terminal):
    assert terminal.seen.startswith(b"fake: ")

    terminal.press("gate\r")
    terminal.until("before the gate, ")
    assert b"after the gate" not in terminal.seen
    terminal.gate.touch()
    terminal.until("after the gate")
    terminal.until(READY)


def test_text_of_any_language_a_paste_and_edited_lines_are_messages(terminal):
    for number, text in enumerate(["é", "漢字かな", "a é 漢字 😀 z"]):
        assert f"<<{text!r} is message {2 * number + 1}>>" in terminal.enter(text)
    left, up = "\x1b[D", "\x1b[A"
    assert "<<'abc' is" in terminal.enter(f"bcx\x7f{left}{left}a")
    assert "<<'abcd' is" in terminal.enter(f"{up}d")

    terminal.press("\x1b[200~line one\n  line two\r\nline three\x1b[201~")
    terminal.until("line three")
    assert r"<<'line one\n  line two\nline three' is message " in terminal.enter("")


def test_a_reply_cannot_control_the_terminal(terminal):
    shown = terminal.enter("evil")

    reply = shown.split("\x1b[?2004l")[1].split("\r\n")[0]
    assert reply.startswith("\ufffd]52;c;ZXZpbA==\ufffd\ufffd[2J\ufffd2J\ufffdevil<<")


def test_interrupts_stop_a_reply_and_never_the_chat(terminal):
    for _ in range(3):
        terminal.press("slow\r")
        terminal.until("on and on and ")
        for _ in range(9):
            terminal.press(INTERRUPT)
            time.sleep(0.002)  # some arrive in the reply, some at the prompt
        terminal.until("(stopped)\r\n")
        terminal.press("still there\r")
        terminal.until("<<'still there' is message ")
        terminal.until(READY)


def test_an_interrupt_at_the_prompt_clears_the_line_and_once_says_how_to_quit(terminal):
    for _ in range(2):
        terminal.press("wrong")
        terminal.until("wrong")
        terminal.press(INTERRUPT)
        terminal.until(READY)

    assert "<<'right' is message 1>>" in terminal.enter("right")
    assert terminal.seen.count(b"(/quit or Ctrl-D quits)") == 1
    assert "Did you mean /retry?" in terminal.enter("/rety")


def test_ctrl_d_quits_with_success(terminal):
    terminal.press(END)

    assert terminal.child.wait(SECONDS) == 0
