"""Grades for answers from a larger model, asked over any OpenAI-compatible endpoint.

Such is https://api.openai.com/v1, and Ollama's http://localhost:11434/v1. A key from
OPENAI_API_KEY is never sent in the clear over a network, nor to where a server
redirects. What the judge cannot grade is counted, never averaged in.
"""

import dataclasses
import email.utils
import http.client
import ipaddress
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from time import sleep
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

from gptjax.download import offline
from gptjax.errors import ConfigError, ModelError
from gptjax.scores import mean_interval

FIRST_WAIT = 1.0  # seconds before the second try; each later wait is twice as long
LONGEST_WAIT = 60.0  # seconds between two tries, whatever the server asks for
MOST = 1_000_000  # bytes of a reply
SHOWN = 200  # characters of a reply in an error
PATH = "/chat/completions"
SCORE = re.compile(r"(?:score ?[:=] ?)?(100|[1-9]?[0-9])(?: ?/ ?100)? ?\.?", re.I)


class UnreachableError(ModelError):
    """No prompt at all would be answered, as far as one can tell from this one."""


@dataclasses.dataclass(frozen=True)
class Judge:
    """A model behind an endpoint."""

    url: str  # such as http://localhost:11434/v1, or one that ends in PATH
    model: str
    seconds: int | float = 60  # without a word from the server
    tries: int = 3

    def __post_init__(self) -> None:
        """Refuses what cannot be asked."""
        endpoint(self.url)
        if not self.model.strip():
            raise ConfigError("the judge has no model. Name one that the server has.")
        if not 0 < self.seconds <= 86_400 or self.tries < 1:
            raise ConfigError(
                f"a judge with seconds={self.seconds} and tries={self.tries} cannot "
                "be asked. Give more than 0 seconds, at most 86400, and 1 try or more."
            )


class Judgement(NamedTuple):
    """What the judge said about one answer."""

    score: int | None  # 0 to 100; None if the reply has none, or there is no reply
    reply: str
    error: str  # why there is no reply, else ""


def judge_prompt(prompt: str, output: str, response: str) -> str:
    """What the judge is asked, word for word that of Raschka 2024, chapter 7.

    Args:
        prompt: what the model was asked.
        output: the right answer.
        response: the model's answer.
    """
    return (
        f"Given the input `{prompt}` and correct output `{output}`, score the model "
        f"response `{response}` on a scale from 0 to 100, where 100 is the best score. "
        "Respond with the integer number only."
    )


def parse_score(reply: str) -> int | None:
    """The integer from 0 to 100 that the reply is; None if it is anything else.

    Forgiven are "Score:" before it, "/100" and a full stop behind it, quotes and
    Markdown's marks around it, and what a reasoning model thought before.

    >>> parse_score("<think>Not bad.</think> **Score:** 85/100.")
    85
    >>> parse_score("85 or 90"), parse_score("8.5")
    (None, None)
    """
    answer = re.sub(r"^.*?</think>", "", reply, count=1, flags=re.S)
    bare = re.sub(r"[\s*\"'`“”‘’]+", " ", answer).strip()
    found = SCORE.fullmatch(bare)
    return int(found[1]) if found else None


def judge_all(
    judge: Judge,
    rows: Sequence[tuple[str, str, str]],
    done: Callable[[int, Judgement], None],
) -> list[Judgement]:
    """A judgement of each row, in order.

    Args:
        judge: asked for one row after the other.
        rows: prompt, right answer, and the model's answer.
        done: called with a row's number and its judgement as soon as that is known.

    Raises:
        ConfigError: the judge must not be asked.
        UnreachableError: the first row shows that no row would be graded.
    """
    judgements = []
    for n, row in enumerate(rows):
        try:
            reply = ask(judge, judge_prompt(*row))
            judgement = Judgement(parse_score(reply), reply, "")
        except ModelError as error:
            if n == 0 and isinstance(error, UnreachableError):
                raise
            judgement = Judgement(None, "", str(error))
        done(n, judgement)
        judgements.append(judgement)
    return judgements


def summary(judgements: Sequence[Judgement]) -> dict[str, float | int | None]:
    """Counts, and the mean score with its 95 % interval over those that have one."""
    found = [one.score for one in judgements if one.score is not None]
    failed = sum(bool(one.error) for one in judgements)
    low, high = mean_interval(found) if found else (None, None)
    return {
        "judged": len(judgements),
        "scored": len(found),
        "unparsable": len(judgements) - len(found) - failed,
        "failed": failed,
        "mean_score": sum(found) / len(found) if found else None,
        "low": low,
        "high": high,
    }


def ask(judge: Judge, prompt: str) -> str:
    """The judge's reply to one prompt.

    Raises:
        ConfigError: the judge must not be asked.
        ModelError: the server refuses the prompt, or UnreachableError: any prompt.
    """
    request, n = request_of(judge, prompt), 0
    while True:
        try:
            return text_of(judge, receive(judge, request))
        except (OSError, http.client.HTTPException) as error:
            n += 1
            status = error.code if isinstance(error, urllib.error.HTTPError) else 599
            if n == judge.tries or (status != 429 and status < 500):
                raise failure(judge, error) from error
            wait = max(FIRST_WAIT * 2 ** (n - 1), asked_wait(error))
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it is the server's answer too
        sleep(min(wait, LONGEST_WAIT))


def check_allowed(judge: Judge) -> None:
    """Raises a ConfigError if the judge must not be asked, before work is done."""
    url = endpoint(judge.url)
    if loopback(url):
        return
    if offline():
        raise ConfigError(
            f"GPTJAX_OFFLINE forbids to ask {address(url)}. Unset GPTJAX_OFFLINE, or "
            "give the url of a server on this machine."
        )
    if url.scheme != "https" and api_key():
        raise ConfigError(
            f"the key in OPENAI_API_KEY would go over the network in the clear to "
            f"{address(url)}. Give an https url, or unset OPENAI_API_KEY if that "
            "server needs no key."
        )


def endpoint(url: str) -> SplitResult:
    """The parts of the address that takes prompts.

    >>> endpoint("http://localhost:11434/v1/").path
    '/v1/chat/completions'
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname
        usable = usable and "@" not in parts.netloc and parts.port != 0
        if not usable or not re.fullmatch(r"[!-~]+", url):
            raise ValueError
    except ValueError:  # also of a port that is no number, or half an IPv6 address
        harmless = re.sub(r"//.*@", "//…@", url)  # it may hold a password
        raise ConfigError(
            f"the judge's url {harmless!r} cannot be used. Give one that begins with "
            "http:// or https://, without a user name or spaces, such as "
            "http://localhost:11434/v1; a key goes into OPENAI_API_KEY."
        ) from None
    path = parts.path.rstrip("/").removesuffix(PATH) + PATH
    return parts._replace(path=path, fragment="")


def address(url: SplitResult) -> str:
    """The address for people, without a query, which may hold a key."""
    return url._replace(query="").geturl()


def loopback(url: SplitResult) -> bool:
    """Whether the server is this machine, by its very name."""
    host = url.hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name
        return False


def api_key() -> str:
    """The user's key, or nothing."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise ConfigError(
            "OPENAI_API_KEY holds something that is no key: a space, a line break or "
            "a letter that is not ASCII. Set it again, to the key alone."
        )
    return key


def request_of(judge: Judge, prompt: str) -> urllib.request.Request:
    """The request that asks for the likeliest reply."""
    check_allowed(judge)
    body = {
        "model": judge.model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "seed": 123,
    }
    headers = {"User-Agent": "gptjax", "Content-Type": "application/json"}
    url = endpoint(judge.url).geturl()
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    if key := api_key():
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    return request


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """Leaves a redirect as the error that its status is: prompts go nowhere else."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """No request for the new place."""


def receive(judge: Judge, request: urllib.request.Request) -> bytes:
    """The body of the server's answer."""
    handlers: list[Any] = [NoRedirects]
    if loopback(urlsplit(request.full_url)):  # a proxy is not this machine
        handlers.append(urllib.request.ProxyHandler({}))
    opener = urllib.request.build_opener(*handlers)
    with opener.open(request, timeout=judge.seconds) as answer:
        length, body = answer.length, read_start(answer, MOST + 1, judge.seconds)
    if len(body) > MOST:
        raise ModelError(
            f"{whom(judge)} replies with more than {MOST:,} bytes. Name a model that "
            "answers shortly."
        )
    if length is not None and len(body) < length:
        raise OSError(f"the connection ended after {len(body)} of {length} bytes")
    return body


def read_start(answer: Any, most: int, seconds: int | float) -> bytes:
    """The first bytes of a body, which must not trickle in for longer than that."""
    body, end = b"", time.monotonic() + seconds
    while block := answer.read1(most - len(body)):
        body += block
        if time.monotonic() > end:
            raise TimeoutError("timed out in the middle of the reply")
    return body


def text_of(judge: Judge, body: bytes) -> str:
    """The text in the body of an answer."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    match answer:
        case {"choices": [{"message": {"content": str(text)}}, *_]}:
            # What is half a character of UTF-16 could not be written to a file.
            return text.encode("utf-8", "replace").decode()
        case {"choices": [{"message": {}}, *_]}:
            raise ModelError(
                f"{whom(judge)} replies without text: {shown(body)}. Name a model "
                "that writes text."
            )
    raise UnreachableError(
        f"{whom(judge)} does not answer as OpenAI's chat completions do: "
        f"{shown(body) or 'nothing'}. Check the url, which mostly ends in /v1."
    )


def asked_wait(error: Exception) -> float:
    """The seconds that a server asks to wait by Retry-After, else 0."""
    if not isinstance(error, urllib.error.HTTPError):
        return 0.0
    text = error.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        return float(text)
    try:
        return email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0


def whom(judge: Judge) -> str:
    """The judge in an error."""
    return f"the judge {judge.model} at {address(endpoint(judge.url))}"


def shown(body: bytes) -> str:
    """The start of a body on one line, without the user's key."""
    text = body.decode("utf-8", "replace")
    if key := api_key():
        text = text.replace(key, "…")
    visible = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(visible.split())[:SHOWN]


def failure(judge: Judge, error: Exception) -> ModelError:
    """The error for the user when the judge is not asked again."""
    if isinstance(error, urllib.error.HTTPError):
        return refusal(judge, error)
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    fix = "Check the url and the network."
    if isinstance(reason, TimeoutError):
        fix = f"Allow more than {judge.seconds:g} seconds, or name a smaller model."
    elif loopback(endpoint(judge.url)):
        fix = "Is the server running, such as `ollama serve`?"
    return UnreachableError(
        f"{whom(judge)} cannot be asked: {reason or type(reason).__name__} "
        f"({judge.tries} tries). {fix}"
    )


def refusal(judge: Judge, error: urllib.error.HTTPError) -> ModelError:
    """The error for a status that is no success."""
    kind, code = UnreachableError, error.code
    if code < 400:
        to = shown(error.headers.get("Location", "").encode("utf-8", "replace"))
        fix = f"It redirects to {to or 'nowhere'}; give the url of the server itself."
    elif code in (401, 403):
        fix = "Put a key that may use this model into OPENAI_API_KEY."
    elif code in (404, 405):
        fix = (
            "Check the url, which mostly ends in /v1, and the model's name; Ollama "
            f"gets a model by `ollama pull {judge.model}`."
        )
    elif code == 429:
        fix = "Wait, or look at what the account may still use."
    elif code >= 500:
        fix = "Look at the server's log, or try again later."
    else:
        kind, fix = ModelError, "Mend what it complains about."
    try:
        with error:
            text = shown(read_start(error, 8 * SHOWN, judge.seconds))
    except (OSError, http.client.HTTPException):
        text = ""
    return kind(
        f"{whom(judge)} answers with status {code}: {text or error.reason}. {fix}"
    )
