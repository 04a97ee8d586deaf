"""LLM judge: scores answers with a model behind an OpenAI-compatible endpoint.

Examples of endpoints are https://api.openai.com/v1 and Ollama's
http://localhost:11434/v1. The key in OPENAI_API_KEY is never sent unencrypted over a
network, and redirects are not followed. Answers without a score are counted, but not
included in the mean.
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

from gptjax.errors import ConfigError, ModelError
from gptjax.evaluation.metrics import mean_ci
from gptjax.fileio.download import is_offline

MIN_BACKOFF = 1.0  # seconds before the first retry; doubles with each retry
MAX_BACKOFF = 60.0  # seconds; also limits the Retry-After of the server
MAX_REPLY_BYTES = 1_000_000
MAX_SHOWN = 200  # characters of a reply in an error message
CHAT_COMPLETIONS_PATH = "/chat/completions"
SCORE_PATTERN = re.compile(r"(?:score ?[:=] ?)?(100|[1-9]?[0-9])(?: ?/ ?100)? ?\.?", re.I)


class UnreachableError(ModelError):
    """The endpoint is unusable; other prompts would fail in the same way."""


@dataclasses.dataclass(frozen=True)
class LLMJudge:
    """Model and endpoint of an LLM judge."""

    url: str  # base URL such as http://localhost:11434/v1, or the full URL
    model: str
    timeout: int | float = 60  # for connecting, and for reading a reply
    max_attempts: int = 3  # attempts, the first one included

    def __post_init__(self) -> None:
        """Validates the endpoint and the limits."""
        endpoint(self.url)
        if not self.model.strip():
            raise ConfigError("the judge's model is empty. Name a model of the server.")
        if not 0 < self.timeout <= 86_400 or self.max_attempts < 1:
            raise ConfigError(
                f"the judge has timeout={self.timeout} and "
                f"max_attempts={self.max_attempts}. Use a timeout above 0 and at most "
                "86400 seconds, and at least 1 attempt."
            )


class Judgement(NamedTuple):
    """Score of one answer and the reply it was parsed from."""

    score: int | None  # 0 to 100; None without a reply or if it has no score
    reply: str
    error: str  # reason if there is no reply, else ""


def judge_prompt(prompt: str, output: str, response: str) -> str:
    """Prompt for the judge, verbatim from Raschka 2024, chapter 7.

    Args:
        prompt: the model's input.
        output: the reference answer.
        response: the model's answer.
    """
    return (
        f"Given the input `{prompt}` and correct output `{output}`, score the model "
        f"response `{response}` on a scale from 0 to 100, where 100 is the best score. "
        "Respond with the integer number only."
    )


def parse_score(reply: str) -> int | None:
    """Parses a reply that is an integer from 0 to 100; None for any other reply.

    Ignores a "Score:" prefix, a "/100" suffix, a final full stop, surrounding quotes
    and Markdown, and the <think> block of a reasoning model.

    >>> parse_score("<think>Not bad.</think> **Score:** 85/100.")
    85
    >>> parse_score("85 or 90"), parse_score("8.5")
    (None, None)
    """
    answer = re.sub(r"^.*?</think>", "", reply, count=1, flags=re.S)
    bare = re.sub(r"[\s*\"'`“”‘’]+", " ", answer).strip()
    found = SCORE_PATTERN.fullmatch(bare)
    return int(found[1]) if found else None


def judge_all(
    judge: LLMJudge,
    rows: Sequence[tuple[str, str, str]],
    on_judgement: Callable[[int, Judgement], None],
) -> list[Judgement]:
    """Judges rows one after the other.

    Args:
        judge: model and endpoint.
        rows: tuples of prompt, reference answer and the model's answer.
        on_judgement: called with the row index and the judgement after each row.

    Raises:
        ConfigError: requests to the endpoint are not allowed.
        UnreachableError: the endpoint cannot be used for the first row.
    """
    judgements = []
    for n, row in enumerate(rows):
        try:
            reply = chat_completion(judge, judge_prompt(*row))
            judgement = Judgement(parse_score(reply), reply, "")
        except ModelError as error:
            if n == 0 and isinstance(error, UnreachableError):
                raise
            judgement = Judgement(None, "", str(error))
        on_judgement(n, judgement)
        judgements.append(judgement)
    return judgements


def summarize_judgements(judgements: Sequence[Judgement]) -> dict[str, float | int | None]:
    """Counts judgements; mean score and its 95% interval over those with a score."""
    found = [one.score for one in judgements if one.score is not None]
    failed = sum(bool(one.error) for one in judgements)
    low, high = mean_ci(found) if found else (None, None)
    return {
        "judged": len(judgements),
        "scored": len(found),
        "unparsable": len(judgements) - len(found) - failed,
        "failed": failed,
        "mean_score": sum(found) / len(found) if found else None,
        "low": low,
        "high": high,
    }


def chat_completion(judge: LLMJudge, prompt: str) -> str:
    """Requests the judge's reply to one prompt, with retries.

    Raises:
        ConfigError: requests to the endpoint are not allowed.
        ModelError: the server rejects the prompt.
        UnreachableError: the endpoint is unusable.
    """
    request, n = build_request(judge, prompt), 0
    while True:
        try:
            return reply_text(judge, read_response(judge, request))
        except (OSError, http.client.HTTPException) as error:
            n += 1
            status = error.code if isinstance(error, urllib.error.HTTPError) else 599
            if n == judge.max_attempts or (status != 429 and status < 500):
                raise to_error(judge, error) from error
            wait = max(MIN_BACKOFF * 2 ** (n - 1), retry_after(error))
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # the error owns the response
        sleep(min(wait, MAX_BACKOFF))


def check_judge_allowed(judge: LLMJudge) -> None:
    """Raises ConfigError if requests to the judge are not allowed."""
    url = endpoint(judge.url)
    if is_loopback(url):
        return
    if is_offline():
        raise ConfigError(
            f"GPTJAX_OFFLINE forbids requests to {display_url(url)}. Unset it, or pass "
            "the URL of a server on this machine."
        )
    if url.scheme != "https" and api_key():
        raise ConfigError(
            "the key in OPENAI_API_KEY would be sent unencrypted to "
            f"{display_url(url)}. Pass an https URL, or unset OPENAI_API_KEY if the "
            "server needs no key."
        )


def endpoint(url: str) -> SplitResult:
    """Parses and validates a URL; returns that of the chat completions endpoint.

    >>> endpoint("http://localhost:11434/v1/").path
    '/v1/chat/completions'
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname
        usable = usable and "@" not in parts.netloc and parts.port != 0
        if not usable or not re.fullmatch(r"[!-~]+", url):
            raise ValueError
    except ValueError:  # also raised for an invalid port or IPv6 address
        harmless = re.sub(r"//.*@", "//…@", url)  # may contain a password
        raise ConfigError(
            f"the judge's URL {harmless!r} is invalid. Pass an http:// or https:// URL "
            "without user name and spaces, such as http://localhost:11434/v1; put a "
            "key into OPENAI_API_KEY."
        ) from None
    base_path = parts.path.rstrip("/").removesuffix(CHAT_COMPLETIONS_PATH)
    return parts._replace(path=base_path + CHAT_COMPLETIONS_PATH, fragment="")


def display_url(url: SplitResult) -> str:
    """URL for messages, without the query, which may contain a key."""
    return url._replace(query="").geturl()


def is_loopback(url: SplitResult) -> bool:
    """True if the host is localhost or a loopback address."""
    host = url.hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a host name
        return False


def api_key() -> str:
    """API key from OPENAI_API_KEY, or an empty string."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise ConfigError(
            "OPENAI_API_KEY contains a space, a line break or a non-ASCII character. "
            "Set it to the key alone."
        )
    return key


def build_request(judge: LLMJudge, prompt: str) -> urllib.request.Request:
    """Builds a chat completion request with greedy decoding."""
    check_judge_allowed(judge)
    body = {
        "model": judge.model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "seed": 123,
    }
    headers = {"User-Agent": "gptjax", "Content-Type": "application/json"}
    url = endpoint(judge.url).geturl()
    # `endpoint` allows only http and https.
    request = urllib.request.Request(  # noqa: S310
        url, json.dumps(body).encode(), headers
    )
    if key := api_key():
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    return request


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """Rejects redirects, so that prompts reach no other server."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Returns None: the redirect is raised as an HTTPError."""


def read_response(judge: LLMJudge, request: urllib.request.Request) -> bytes:
    """Sends a request and returns the body of the response."""
    handlers: list[Any] = [NoRedirects]
    if is_loopback(urlsplit(request.full_url)):  # no proxy for this machine
        handlers.append(urllib.request.ProxyHandler({}))
    opener = urllib.request.build_opener(*handlers)
    with opener.open(request, timeout=judge.timeout) as answer:
        length = answer.length
        body = read_limited(answer, MAX_REPLY_BYTES + 1, judge.timeout)
    if len(body) > MAX_REPLY_BYTES:
        raise ModelError(
            f"{describe_endpoint(judge)} replied with more than {MAX_REPLY_BYTES:,} "
            "bytes. Name a model with shorter answers."
        )
    if length is not None and len(body) < length:
        raise OSError(f"the connection closed after {len(body)} of {length} bytes")
    return body


def read_limited(answer: Any, max_bytes: int, timeout: int | float) -> bytes:
    """Reads at most `max_bytes` of a body within a total time limit."""
    body, end = b"", time.monotonic() + timeout
    while block := answer.read1(max_bytes - len(body)):
        body += block
        if time.monotonic() > end:
            raise TimeoutError("timed out in the middle of the reply")
    return body


def reply_text(judge: LLMJudge, body: bytes) -> str:
    """Extracts the text from the body of a chat completion."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    match answer:
        case {"choices": [{"message": {"content": str(text)}}, *_]}:
            # Lone surrogates cannot be written to a UTF-8 file.
            return text.encode("utf-8", "replace").decode()
        case {"choices": [{"message": {}}, *_]}:
            raise ModelError(
                f"{describe_endpoint(judge)} replied without text: {redact(body)}. "
                "Name a model that generates text."
            )
    raise UnreachableError(
        f"{describe_endpoint(judge)} did not return an OpenAI chat completion: "
        f"{redact(body) or 'empty body'}. Check the URL, which usually ends in /v1."
    )


def retry_after(error: Exception) -> float:
    """Seconds from the Retry-After header of an error, else 0."""
    if not isinstance(error, urllib.error.HTTPError):
        return 0.0
    text = error.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        return float(text)
    try:
        return email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0


def describe_endpoint(judge: LLMJudge) -> str:
    """Judge model and URL for error messages."""
    return f"the judge {judge.model} at {display_url(endpoint(judge.url))}"


def redact(body: bytes) -> str:
    """Start of a body on one line, with the API key redacted."""
    text = body.decode("utf-8", "replace")
    if key := api_key():
        text = text.replace(key, "…")
    visible = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(visible.split())[:MAX_SHOWN]


def to_error(judge: LLMJudge, error: Exception) -> ModelError:
    """Converts the last error of a request to a ModelError."""
    if isinstance(error, urllib.error.HTTPError):
        return http_status_error(judge, error)
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    fix = "Check the URL and the network."
    if isinstance(reason, TimeoutError):
        fix = f"Increase the timeout of {judge.timeout:g} s, or name a smaller model."
    elif is_loopback(endpoint(judge.url)):
        fix = "Is the server running, such as `ollama serve`?"
    return UnreachableError(
        f"{describe_endpoint(judge)} cannot be reached: "
        f"{reason or type(reason).__name__} ({judge.max_attempts} attempts). {fix}"
    )


def http_status_error(judge: LLMJudge, error: urllib.error.HTTPError) -> ModelError:
    """Converts an HTTP error status to a ModelError."""
    kind, code = UnreachableError, error.code
    if code < 400:
        to = redact(error.headers.get("Location", "").encode("utf-8", "replace"))
        fix = f"It redirects to {to or 'nowhere'}; pass the final URL instead."
    elif code in (401, 403):
        fix = "Set OPENAI_API_KEY to a key with access to this model."
    elif code in (404, 405):
        fix = (
            "Check the URL, which usually ends in /v1, and the model's name; for "
            f"Ollama, run `ollama pull {judge.model}`."
        )
    elif code == 429:
        fix = "Wait, or check the quota of the account."
    elif code >= 500:
        fix = "Check the server's log, or try again later."
    else:
        kind, fix = ModelError, "Correct the request accordingly."
    try:
        with error:
            text = redact(read_limited(error, 8 * MAX_SHOWN, judge.timeout))
    except (OSError, http.client.HTTPException):
        text = ""
    return kind(f"{describe_endpoint(judge)} returned status {code}: {text or error.reason}. {fix}")
