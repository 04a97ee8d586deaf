"""Chatting: what is kept of a conversation, what each command does to it."""

import dataclasses
import json
import signal
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.cli import chat
from gptjax.cli.chat import ChatSession, truncate_history
from gptjax.errors import ConfigError, DataError, ModelError
from tests.small_models import make_model

CONTEXT = 64
BASE = make_model(context_length=CONTEXT, n_layers=1)
ASSISTANT = dataclasses.replace(BASE, chat_template="any")


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def one_per_character(model, messages):
    """As many tokens as the messages have characters."""
    return [0] * sum(len(message["content"]) for message in messages)


def echo(messages, pressed):
    yield f"<{messages[-1]['content']}"
    yield ">"


class Talk(NamedTuple):
    session: ChatSession
    put: str
    said: list[str]
    calls: list[tuple]  # (messages, sampling) of each answer


def talk(*lines, model=ASSISTANT, session=None, answer=echo, **sampling):
    """What comes of the lines, answered by a fake."""
    put, said, calls, pressed = [], [], [], []

    def fake(model, messages, **sampling):
        calls.append((messages, sampling))
        return answer(messages, pressed)

    def fake_base(model, text, **sampling):
        return fake(model, [user(text)], **sampling)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "stream_answer", fake)
        patch.setattr(chat, "stream", fake_base)
        patch.setattr(chat, "encode_chat", one_per_character)
        session = chat.run_repl(
            model,
            session or ChatSession({"max_new_tokens": 8, **sampling}),
            lines,
            put.append,
            said.append,
            pressed,
        )
    return Talk(session, "".join(put), said, calls)


@pytest.mark.fast
def test_each_message_is_answered_with_all_that_was_said_before():
    result = talk("one", "two")

    messages = (user("one"), bot("<one>"), user("two"), bot("<two>"))
    assert result.session.history == messages
    assert [call[0] for call in result.calls] == [[*messages[:1]], [*messages[:3]]]
    assert result.put == "<one>\n<two>\n"
    assert result.said == []


def test_every_answer_has_a_seed_of_its_own():
    result = talk("a", "/retry", "b", "/retry", seed=5, top_k=3)

    options = {"max_new_tokens": 8, "top_k": 3}
    assert [call[1] for call in result.calls] == [
        {**options, "seed": seed} for seed in (5, 6, 7, 8)
    ]


def test_retry_asks_the_last_message_again_without_its_answer():
    result = talk("a", "b", "/retry")

    assert result.calls[2][0] == result.calls[1][0]
    assert result.session.history == (user("a"), bot("<a>"), user("b"), bot("<b>"))


@pytest.mark.parametrize("lines", [[], ["/system be brief"], ["a", "/reset"]])
def test_there_is_nothing_to_ask_again_without_a_message(lines):
    result = talk(*lines, "/retry")

    assert "no message to send again" in result.said[-1]
    assert len(result.calls) == len(lines) // 2


def test_a_blank_line_is_no_message():
    assert talk("", "  ", "\t").calls == []


def test_a_message_of_several_lines_or_blanks_arrives_as_it_is():
    texts = ["a\n b\n", "  x ", "é 漢字 👩\u200d👧"]

    assert [call[0][-1] for call in talk(*texts).calls] == list(map(user, texts))


def test_a_blank_in_front_makes_a_message_of_what_looks_like_a_command():
    result = talk(" /quit", "  /x")

    assert [call[0][-1] for call in result.calls] == [user("/quit"), user("  /x")]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/rest", "there is no command /rest. Did you mean /reset? /help lists them"),
        ("/", "there is no command /. /help lists them. To send a message that starts"),
        ("/etc/passwd\nis a file", "there is no command /etc/passwd."),
        ("/temperature", "temperature cannot be ''. Use a number, such as 0.7."),
        ("/temperature warm", "temperature cannot be 'warm'"),
        ("/temperature inf", "temperature cannot be 'inf'"),
        ("/temperature nan", "temperature=nan must be at least"),
        ("/temperature -1", "temperature=-1.0 must be at least"),
        ("/top-k 1.5", "top_k cannot be '1.5'. Use a number, such as 40."),
        ("/top-k -2", "top_k=-2 must be at least"),
        ("/save", "/save needs a file name"),
    ],
)
def test_a_mistake_is_one_remark_and_the_chat_goes_on(line, words):
    result = talk("a", line, "b")

    assert len(result.said) == 1
    assert words in result.said[0]
    assert [call[0][-1] for call in result.calls] == [user("a"), user("b")]
    assert result.session.sampling == {"max_new_tokens": 8}


def test_settings_count_from_the_next_answer_on():
    result = talk("a", "/temperature 0.5", "/top-k 7", "b", temperature=1.0)

    before, after = (call[1] for call in result.calls)
    assert (before["temperature"], before.get("top_k")) == (1.0, None)
    assert (after["temperature"], after["top_k"]) == (0.5, 7)
    assert result.said == ["(temperature is 0.5)", "(top_k is 7)"]


def test_the_system_message_is_set_replaced_and_removed_and_turns_stay():
    turns = (user("a"), bot("<a>"))

    once = talk("a", "/system be\nbrief")
    twice = talk("/system be long", session=once.session)
    removed = talk("/system", session=twice.session)

    assert once.session.history == (system("be\nbrief"), *turns)
    assert twice.session.history == (system("be long"), *turns)
    assert removed.session.history == turns
    assert removed.said == ["(the system message is removed)"]
    assert talk("b", session=once.session).calls[0][0][0] == system("be\nbrief")


def test_reset_leaves_the_system_message_alone():
    result = talk("/system s", "a", "/reset")

    assert result.session.history == (system("s"),)
    assert result.said[-1] == "(dropped all turns)"


def test_nothing_is_read_after_quit():
    result = talk("a", "/quit", "b")

    assert len(result.calls) == 1


def test_help_lists_every_command():
    (text,) = talk("/help").said
    (base,) = talk("/help", model=BASE).said

    assert {line.split()[0] for line in text.splitlines()} >= {*chat.CHAT_COMMANDS}
    assert {"/retry", "/temperature", "/quit"} < {*base.split()}
    assert not {"/save", "/system", "/reset"} & {*base.split()}


def test_save_writes_all_messages_and_nothing_else(tmp_path):
    file = tmp_path / "talk.json"

    result = talk("/system é", "1" * 30, "2" * 30, f"/save {file}")

    assert [file] == list(tmp_path.iterdir())
    one, two = ([user(n * 30), bot(f"<{n * 30}>")] for n in "12")
    assert json.loads(file.read_text(encoding="utf-8")) == [system("é"), *one, *two]
    assert "é" in file.read_text(encoding="utf-8")
    assert result.session.history == (system("é"), *two)
    assert result.said[-1] == f"(saved 5 messages to {file})"


def test_reset_forgets_what_was_forgotten_too(tmp_path):
    file = tmp_path / "talk.json"

    talk("1" * 30, "2" * 30, "/reset", f"/save {file}")

    assert json.loads(file.read_text()) == []


def test_save_writes_over_nothing(tmp_path):
    file = tmp_path / "talk.json"
    file.write_text("mine")

    result = talk("a", f"/save {file}")

    assert len(result.said) == 1
    assert result.said[0].startswith(f"{file} already exists")
    assert file.read_text() == "mine"


@pytest.mark.parametrize("name", ["none/talk.json", "\0", "~nobody-of-that-name/x"])
def test_a_file_that_cannot_be_written_is_a_remark(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)

    result = talk("a", f"/save {name}", "b")

    assert "cannot write" in result.said[0]
    assert len(result.calls) == 2


@given(
    st.sampled_from(["", "s", "s" * 20]),
    st.lists(st.integers(0, 40), max_size=9),
    st.integers(0, 30),
    st.integers(0, CONTEXT // 2),
)
def test_as_many_turns_are_kept_as_leave_the_reserve(instruction, sizes, last, reserve):
    head = [system(instruction)] if instruction else []
    turns = [m for size in sizes for m in (user("u" * (size // 2)), bot("b" * size))]
    question = user("q" * last)
    room = CONTEXT - reserve

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "encode_chat", one_per_character)
        if len(instruction) + last > room:
            with pytest.raises(DataError, match=f"at most {room:,} fit"):
                truncate_history(ASSISTANT, [*head, *turns, question], reserve)
            return
        rest, count = truncate_history(ASSISTANT, [*head, *turns, question], reserve)

    assert rest == [*head, *turns[2 * count :], question]
    assert len(one_per_character(None, rest)) <= room
    if count:
        more = [*head, *turns[2 * count - 2 :], question]
        assert len(one_per_character(None, more)) > room


def test_what_no_longer_fits_is_forgotten_with_a_remark_each_time():
    def forgot(turns):
        return f"(dropped the first {turns}: the context of 64 tokens is full)"

    # A turn takes 10 + 12 tokens, and 56 are free.
    texts = [letter * 10 for letter in "abcdef"]
    result = talk(*texts[:3], "/system " + "s" * 20, *texts[3:], "/retry")

    assert [len(call[0]) for call in result.calls] == [1, 3, 5, 4, 4, 4, 4]
    assert result.said[1:] == [forgot("2 turns"), forgot("1 turn"), forgot("1 turn")]
    turns = [user("e" * 10), bot(f"<{'e' * 10}>"), user("f" * 10), bot(f"<{'f' * 10}>")]
    assert result.session.history == (system("s" * 20), *turns)


def test_at_most_half_of_the_context_is_kept_for_the_answer():
    fits = talk("x" * 32, max_new_tokens=1000)
    result = talk("x" * 33, max_new_tokens=1000)

    assert len(fits.calls) == 1
    assert result.calls == []
    assert result.said == [
        "the message is 33 tokens long with the template, but at most 32 fit: 32 of "
        "the context's 64 are reserved for the reply. Shorten it."
    ]


def test_a_message_that_does_not_fit_is_not_added():
    result = talk("/system s", "a", "x" * 60, "b")

    assert "61 tokens long with the template and the system message" in result.said[1]
    assert result.calls[1][0] == [system("s"), user("a"), bot("<a>"), user("b")]


def test_an_error_while_answering_is_a_remark_and_the_message_can_be_retried():
    def fails_on_x(messages, pressed):
        yield "some"
        if messages[-1]["content"] == "x":
            raise DataError("this went wrong.")

    result = talk("a", "x", "/retry", "b", answer=fails_on_x)

    assert result.said == ["this went wrong."] * 2
    assert [call[0] for call in result.calls] == [
        [user("a")],
        *[[user("a"), bot("some"), user("x")]] * 2,
        [user("a"), bot("some"), user("b")],
    ]
    assert result.put == "some\n" * 4
    assert len({call[1]["seed"] for call in result.calls}) == 4


def test_an_interrupt_keeps_what_was_written_and_ends_only_that_answer():
    def interrupted(messages, pressed):
        yield "one "
        yield "two "
        if messages[-1]["content"] == "x":
            pressed += [2, 2, 2]
        yield "three"

    result = talk("x", "b", answer=interrupted)

    assert result.said == ["(stopped)"]
    assert result.put == "one two \none two three\n"
    assert result.calls[1][0] == [user("x"), bot("one two"), user("b")]


def test_no_more_is_computed_after_an_interrupt():
    def interrupted(messages, pressed):
        yield "one"
        pressed.append(2)
        yield "two"
        raise AssertionError

    assert talk("x", answer=interrupted).put == "one\n"


@pytest.mark.parametrize("said", ["(stopped)", "(the reply is empty)"])
def test_a_question_without_an_answer_makes_way_or_is_asked_again(said):
    def silent(messages, pressed):
        if messages[-1]["content"] != "x":
            yield "yes"
        elif said == "(stopped)":
            pressed.append(2)
            yield "never"
        else:
            yield " \n"

    result = talk("a", "x", "/retry", "b", answer=silent)

    assert result.said == [said] * 2
    assert result.calls[1][0] == result.calls[2][0] == [user("a"), bot("yes"), user("x")]
    assert result.calls[3][0] == [user("a"), bot("yes"), user("b")]


@pytest.mark.fast
def test_a_base_model_goes_on_from_each_line_alone():
    result = talk("a", "b" * 100, "/retry", "/system s", model=BASE, seed=1)

    assert [call[0] for call in result.calls] == [[user("a")], *[[user("b" * 100)]] * 2]
    assert [call[1]["seed"] for call in result.calls] == [1, 2, 3]
    assert "no command /system" in result.said[0]


def test_a_classifier_does_not_chat():
    model = dataclasses.replace(BASE, labels=("ham", "spam"))

    with pytest.raises(ModelError, match=r"runs/x is a classifier.*Use gptjax classify"):
        chat.run_chat(model, "runs/x", {})


def test_sampling_that_cannot_be_is_refused_before_anything_is_read():
    with pytest.raises(ConfigError, match=r"temperature=-1.0 must be at least"):
        chat.run_chat(BASE, "name", {"temperature": -1.0})


def test_interrupts_are_counted_and_then_are_what_they_were():
    before = signal.getsignal(signal.SIGINT)

    with chat.handle_interrupts() as pressed:
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)

    assert len(pressed) == 3
    assert signal.getsignal(signal.SIGINT) is before
