"""Chat: what is kept of a conversation, and what each command does to it."""

import dataclasses
import functools
import io
import json
import signal
import sys
from types import SimpleNamespace

import pytest
import tomli_w
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from gptjax.cli import chat
from gptjax.cli.chat import Chat
from gptjax.errors import DataError, ModelError
from gptjax.runtime.terminal import sanitize
from gptjax.tokenizer.chat_template import load_chat_template
from tests.small_models import make_model

CONTEXT = 128
BASE = make_model(context_length=CONTEXT, n_layers=1)
ASSISTANT = dataclasses.replace(BASE, chat_template="any")


def message(role, text):
    return {"role": role, "content": text}


user, bot, system = (functools.partial(message, role) for role in ("user", "assistant", "system"))


def one_per_character(model, messages):
    return [0] * sum(len(message["content"]) for message in messages)


def echo(messages, interrupts):
    yield from (f"<{messages[-1]['content']}", ">")


def talk(*lines, model=ASSISTANT, answer=echo, **sampling):
    """Chats with a fake in place of the model."""
    replies, notices, calls = [], [], []  # a call is (messages, sampling)
    session = Chat(model, {"max_new_tokens": 8, **sampling}, replies.append, notices.append)

    def fake(model, messages, **sampling):
        calls.append((messages if isinstance(messages, list) else [user(messages)], sampling))
        return answer(calls[-1][0], session.interrupts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "stream_answer", fake)
        patch.setattr(chat, "stream", fake)
        patch.setattr(chat, "encode_chat", one_per_character)
        chat.run_repl(session, lines)
    return SimpleNamespace(chat=session, replies="".join(replies), notices=notices, calls=calls)


def test_a_mistake_is_one_notice_and_the_chat_continues(tmp_path):
    for line, words in (
        ("/rest", "/rest. Did you mean /reset?"),
        ("/temperature nan", "temperature=nan"),
        ("/top-k 1.5", "top_k cannot be '1.5'"),
        (f"/save {tmp_path}/none/talk.json", "none/talk.json"),
    ):
        result = talk("a", line, "b")

        (notice,) = result.notices
        assert words in notice
        assert [call[0][-1] for call in result.calls] == [user("a"), user("b")]
        assert result.chat.sampling == {"max_new_tokens": 8}


def test_each_message_is_answered_with_the_messages_before_it_and_a_new_seed():
    result = talk("one", "", " /quit", "/retry", "/top-k 7", "é\n b", "/quit", "c", seed=5)

    messages = [user("one"), bot("<one>"), user("/quit"), bot("</quit>"), user("é\n b")]
    assert result.chat.messages == [*messages, bot("<é\n b>")]
    assert [call[0] for call in result.calls] == [messages[:n] for n in (1, 3, 3, 5)]
    assert [call[1]["seed"] for call in result.calls] == [5, 6, 7, 8]
    assert [call[1].get("top_k") for call in result.calls] == [None, None, None, 7]
    assert result.replies == "<one>\n</quit>\n</quit>\n<é\n b>\n"


def test_the_system_message_is_set_replaced_and_removed_and_outlives_a_reset():
    lines = ["/system be\nbrief", "a", "/system be long", "/reset", "/retry", "b", "/system", "c"]
    result = talk(*lines)

    assert "no message to send again" in result.notices[3]
    assert [call[0] for call in result.calls] == [
        [system("be\nbrief"), user("a")],
        [system("be long"), user("b")],
        [user("b"), bot("<b>"), user("c")],
    ]


def test_a_base_model_completes_each_line_separately_and_lacks_some_commands():
    result = talk("a", "b" * 200, "/retry", "/system s", model=BASE)

    assert [call[0] for call in result.calls] == [[user("a")], *[[user("b" * 200)]] * 2]
    assert "no command /system" in result.notices[0]


def test_save_writes_all_messages_to_a_new_file(tmp_path):
    path = tmp_path / "talk.json"

    result = talk("/system é", "1" * 60, "2" * 60, f"/save {path}", f"/save {path}")

    one, two = ([user(n * 60), bot(f"<{n * 60}>")] for n in "12")
    assert json.loads(path.read_text(encoding="utf-8")) == [system("é"), *one, *two]
    assert result.chat.history() == [system("é"), *two]
    assert "exists" in result.notices[-1]


def test_as_many_turns_are_kept_as_fit_beside_the_reply():
    first, second = ([user(x * 19), bot(f"<{x * 19}>")] for x in "ab")  # 40 tokens each
    lines = ("a" * 19, "b" * 19)

    for question, expected in (("q" * 20, [*first, *second]), ("q" * 21, second)):
        result = talk(*lines, question, max_new_tokens=CONTEXT - 100)

        assert result.calls[2][0] == [*expected, user(question)]


@pytest.mark.parametrize("notice", ["(the reply is empty)", "went wrong"])
def test_a_question_without_a_reply_is_retried_or_dropped(notice):
    def stay_silent(messages, interrupts):
        yield " \n" if messages[-1]["content"] == "x" else "yes"
        if messages[-1]["content"] == "x" and notice == "went wrong":
            raise DataError(notice)

    result = talk("a", "x", "/retry", "b", answer=stay_silent)

    assert result.notices == [notice] * 2
    assert result.calls[1][0] == result.calls[2][0] == [user("a"), bot("yes"), user("x")]
    assert result.calls[3][0] == [user("a"), bot("yes"), user("b")]


def set_stdin(monkeypatch, text, encoding="utf-8"):
    stream = io.TextIOWrapper(io.BytesIO(text.encode(encoding)), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stream)


def test_in_a_pipe_each_line_is_a_message_and_replies_go_to_stdout(monkeypatch, capsys):
    def echo(model, messages, **sampling):
        return iter([messages[-1]["content"], "\x1b[2J!"])

    monkeypatch.setattr(chat, "stream_answer", echo)
    monkeypatch.setattr(chat, "encode_chat", one_per_character)
    set_stdin(monkeypatch, "é\r\n\n漢字\x0c\r字\n/wrong\nlast")

    chat.run_chat(ASSISTANT, "a\x1b[2Jname", {"max_new_tokens": 2})

    out, err = capsys.readouterr()
    assert out == "é\ufffd[2J!\n漢字\ufffd\ufffd字\ufffd[2J!\nlast\ufffd[2J!\n"
    assert "/wrong" in err
    assert "\x1b" not in err


def test_in_a_terminal_pastes_are_messages_and_interrupts_never_end_the_chat(monkeypatch, capsys):
    def stream_answer(model, messages, **sampling):
        yield f"<{messages[-1]['content']!r}"
        if messages[-1]["content"] == "slow":
            signal.raise_signal(signal.SIGINT)
        yield ">"

    monkeypatch.setattr(chat, "stream_answer", stream_answer)
    monkeypatch.setattr(chat, "encode_chat", one_per_character)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    handler = signal.getsignal(signal.SIGINT)
    keys = "é 漢字\rslow\rwrong\x03\x1b[200~one\n  two\r\nthree\x1b[201~\r\x04"

    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        pipe.send_text(keys)
        chat.run_chat(ASSISTANT, "name", {"max_new_tokens": 2})

    _, *lines = capsys.readouterr().out.splitlines()
    hint = "(/quit or Ctrl-D quits)"
    assert lines == ["<'é 漢字'>", "<'slow'", "(stopped)", hint, r"<'one\n  two\nthree'>"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_unsuitable_models_and_texts_are_rejected(monkeypatch):
    with pytest.raises(ModelError, match="classifier of 2 labels"):
        chat.run_chat(dataclasses.replace(BASE, labels=("ham", "spam")), "runs/x", {})
    set_stdin(monkeypatch, "é", encoding="latin-1")
    with pytest.raises(DataError, match="UTF-8"):
        chat.run_chat(ASSISTANT, "name", {})


def test_a_run_on_few_tokens_from_random_initialization_is_announced_as_such(tmp_path):
    def write_run(name, **finetune):
        train = {"steps": 3}
        table = {"model": {"context_length": 8}, "train": train, "data": {"batch_size": 2}}
        (tmp_path / name).mkdir()
        text = tomli_w.dumps(table | {"finetune": finetune})
        (tmp_path / name / "config.toml").write_text(text)
        return str(tmp_path / name)

    base = write_run("base")
    tuned = write_run("tuned", init_from=f"{base}/model")

    assert "48 tokens" in chat.describe_expectation(base)
    assert "96 tokens" in chat.describe_expectation(tuned)
    for name in (write_run("public", init_from="gpt2"), "gpt2", str(tmp_path)):
        assert chat.describe_expectation(name) == ""


def test_an_assistant_with_a_real_template_replies_until_its_context_is_full(monkeypatch, capsys):
    model = dataclasses.replace(BASE, chat_template=load_chat_template("chatml").source)
    set_stdin(monkeypatch, "first\nsecond\n" + "x" * 128)

    chat.run_chat(model, "name", {"max_new_tokens": 12})

    out, err = capsys.readouterr()
    first, second = (
        "".join(chat.stream_answer(model, [user(text)], max_new_tokens=12, seed=seed))
        for seed, text in enumerate(("first", "second"))
    )
    assert out == sanitize(f"{first}\n{second}\n")
    assert "dropped the first 1 turn" in err
    assert "116 fit" in err
