"""LLM judge: scores answers with a model behind an OpenAI-compatible server.

The key in OPENAI_API_KEY is never sent unencrypted over a network, and redirects are
not followed. Answers without a score are counted, but not included in the mean.
"""

import contextlib
import dataclasses
import functools
import ipaddress
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from gptjax.errors import ConfigError, ModelError, install_command
from gptjax.evaluation.metrics import mean_ci
from gptjax.fileio import strict_json
from gptjax.fileio.download import is_offline
from gptjax.runtime.terminal import redact_secrets

TIMEOUT_SECONDS = 60  # for connecting, and without data from the server
MAX_RETRIES = 2  # after connection errors and statuses 408, 409, 429 and 5xx
MAX_RESPONSE_BYTES = 1 << 20
MAX_SHOWN = 200  # characters of a reply in an error message
SCORE_PATTERN = re.compile(r"(?:score ?[:=] ?)?(100|[1-9]?[0-9])(?: ?/ ?100)? ?\.?", re.I)
STATUS_FIXES = {
    **dict.fromkeys((301, 302, 307, 308), "Pass the URL that it redirects to."),
    **dict.fromkeys((401, 403), "Set OPENAI_API_KEY to a key with access to this model."),
    404: "Check the URL, which usually ends in /v1, and the model; Ollama: `ollama pull MODEL`.",
    429: "Wait, or check the quota of the account.",
}
PROMPT_STATUSES = (400, 413, 422)  # other prompts may succeed


class UnreachableError(ModelError):
    """The server is unusable; other prompts would fail in the same way."""


class Judgement(NamedTuple):
    """Score of one answer and the reply it was parsed from."""

    score: int | None  # 0 to 100; None without a reply or if it has no score
    reply: str
    error: str  # reason if there is no reply, else ""


@dataclasses.dataclass(frozen=True)
class LLMJudge:
    """Model behind an OpenAI-compatible server."""

    url: str  # base URL: https://api.openai.com/v1, or Ollama's http://localhost:11434/v1
    model: str

    def __post_init__(self) -> None:
        """Creates the client, which checks whether requests are allowed."""
        _ = self.client

    @functools.cached_property
    def client(self) -> Any:
        """Client of the package `openai`."""
        try:
            import openai
        except ImportError as error:
            raise ConfigError(f"no package openai. Run {install_command('judge')}.") from error
        is_local, key = is_loopback(self.url), os.environ.get("OPENAI_API_KEY", "").strip()
        if not re.fullmatch(r"[!-~]*", key):
            raise ConfigError("OPENAI_API_KEY is not one ASCII word. Set it to the key alone.")
        if not is_local and is_offline():
            raise ConfigError(
                f"GPTJAX_OFFLINE forbids requests to {self.url}. Unset it, or use a local server."
            )
        if not is_local and key and not self.url.startswith("https:"):
            raise ConfigError(
                f"the key in OPENAI_API_KEY would be sent unencrypted to {self.url}. Pass "
                "an https URL, or unset OPENAI_API_KEY if the server needs no key."
            )
        client = openai.OpenAI(
            base_url=self.url.rstrip("/").removesuffix("/chat/completions"),
            api_key=key or "no-key",  # the client requires one
            timeout=TIMEOUT_SECONDS,
            max_retries=MAX_RETRIES,
            # trust_env: proxies
            http_client=openai.DefaultHttpxClient(
                follow_redirects=False,
                trust_env=not is_local,
                headers={"Accept-Encoding": "identity"},
                event_hooks={"response": [read_limited]},
            ),
        )
        # The client also reads these from variables that are meant for OpenAI's server.
        client.organization = client.project = None
        client._custom_headers = {}
        return client

    def reply_to(self, prompt: str) -> str:
        """Requests the greedy reply; ModelError if the server rejects the prompt."""
        import openai

        name = f"the judge {self.model} at {self.url}"
        messages = [{"role": "user", "content": prompt}]
        completions = self.client.chat.completions.with_raw_response
        try:
            response = completions.create(
                model=self.model, messages=messages, temperature=0, seed=123
            )
        except openai.APIStatusError as error:
            status = error.status_code
            kind = ModelError if status in PROMPT_STATUSES else UnreachableError
            fix = STATUS_FIXES.get(status, "Check the server's log.")
            text = quote(error.response.text)
            raise kind(f"{name} returned status {status}: {text}. {fix}") from error
        except openai.APIConnectionError as error:
            if isinstance(error.__cause__, ModelError):
                raise ModelError(f"{name} {error.__cause__}") from error
            raise UnreachableError(
                f"{name} cannot be reached: {quote(str(error.__cause__ or error))}. "
                "Check the URL, and that the server is running, such as `ollama serve`."
            ) from error
        body = response.http_response.text
        kind, reply = UnreachableError, None
        with contextlib.suppress(ValueError):
            reply = strict_json.parse_json(body)
        match reply:
            case {"choices": [{"message": {"content": str(text)}}, *_]}:
                # Lone surrogates cannot be written to a UTF-8 file.
                return redact_secrets(text.encode("utf-8", "replace").decode())
            case {"choices": [{"message": {}}, *_]}:
                kind = ModelError
        raise kind(
            f"{name} did not return a chat completion with text: {quote(body)}. "
            "Check the URL, which usually ends in /v1, and the model."
        )


def read_limited(response: Any) -> None:
    """Reads the body of a response, within limits on its size and time."""
    body, deadline = b"", time.monotonic() + TIMEOUT_SECONDS
    for block in response.stream:
        body += block
        if len(body) > MAX_RESPONSE_BYTES or time.monotonic() > deadline:
            raise ModelError(
                f"sent more than {MAX_RESPONSE_BYTES:,} bytes, or for more than "
                f"{TIMEOUT_SECONDS} seconds. Check the server's log."
            )
    if (encoding := response.headers.get("content-encoding", "identity")) != "identity":
        raise ModelError(f"sent {encoding!r:.40} instead of plain text. Turn its compression off.")
    response.stream.close()
    response.stream = type(response)(200, content=body).stream  # httpx or httpx2, by openai


def quote(text: str) -> str:
    """Quotes the start of a text from the server, without secrets."""
    return repr(redact_secrets(text)[:MAX_SHOWN])


def is_loopback(url: str) -> bool:
    """Validates a base URL; True if its host is this machine."""
    host = ""
    with contextlib.suppress(ValueError):  # invalid port or IPv6 address
        parts = urlsplit(url)
        host = (parts.scheme in ("http", "https") and parts.port != 0 and parts.hostname) or ""
    if not host or not re.fullmatch(r"[!-~]+", url) or re.search(r"[@?#]", url):
        shown = re.sub(r"//.*@", "//…@", url)  # may contain a password
        raise ConfigError(
            f"the judge's URL {shown!r} is invalid. Pass an http:// or https:// base "
            "URL such as http://localhost:11434/v1, and a key as OPENAI_API_KEY."
        )
    with contextlib.suppress(ValueError):  # a host name
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def judge_prompt(prompt: str, reference: str, response: str) -> str:
    """Prompt for the judge, verbatim from Raschka 2024, chapter 7."""
    return (
        f"Given the input `{prompt}` and correct output `{reference}`, score the model "
        f"response `{response}` on a scale from 0 to 100, where 100 is the best score. "
        "Respond with the integer number only."
    )


def parse_score(reply: str) -> int | None:
    """Parses a reply that is an integer from 0 to 100; None for any other reply.

    Ignores "Score:", "/100", a final full stop, quotes, Markdown and a <think> block.

    >>> parse_score("<think>Not bad.</think> **Score:** 85/100.")
    85
    >>> parse_score("85 or 90"), parse_score("8.5")
    (None, None)
    """
    answer = re.sub(r"^.*?</think>", "", reply, count=1, flags=re.S)
    bare = re.sub(r"[\s*\"'`“”‘’]+", " ", answer).strip()
    found = SCORE_PATTERN.fullmatch(bare)
    return int(found[1]) if found else None


def iter_judgements(judge: LLMJudge, rows: Iterable[tuple[str, str, str]]) -> Iterator[Judgement]:
    """Judges rows of prompt, reference answer and the model's answer, one by one.

    A server that is unusable for the first row is an error.
    """
    for n, row in enumerate(rows):
        try:
            reply = judge.reply_to(judge_prompt(*row))
            yield Judgement(parse_score(reply), reply, "")
        except ModelError as error:
            if n == 0 and isinstance(error, UnreachableError):
                raise
            yield Judgement(None, "", str(error))


def summarize_judgements(judgements: Sequence[Judgement]) -> dict[str, float | int | None]:
    """Counts judgements; mean score and its 95% interval over those with a score."""
    scores = [judgement.score for judgement in judgements if judgement.score is not None]
    failed = sum(bool(judgement.error) for judgement in judgements)
    low, high = mean_ci(scores) if scores else (None, None)
    return {
        "judged": len(judgements),
        "scored": len(scores),
        "unparsable": len(judgements) - len(scores) - failed,
        "failed": failed,
        "mean_score": sum(scores) / len(scores) if scores else None,
        "low": low,
        "high": high,
    }
