"""Files of Hugging Face hub repositories, cached and verified at each use.

Each file is verified against the hash pinned here, or else against the hash recorded
in sha256.json at its first use. Weights are accepted as safetensors only.
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from gptjax.config import did_you_mean
from gptjax.errors import DataError, ModelError
from gptjax.fileio import strict_json
from gptjax.fileio.download import (
    Pin,
    RemoteFile,
    RemoteFileNotFoundError,
    download_file,
    is_offline,
    open_part,
    sha256_of_files,
    user_cache_dir,
)
from gptjax.tokenizer.chat_template import CHAT_TEMPLATE_FILE as TEMPLATE

_LogFn = Callable[[str], None]
Record = dict[str, Pin | None]  # None if the repository lacks the file

CONFIG, VOCAB, MERGES = "config.json", "vocab.json", "merges.txt"
TOKENIZER = "tokenizer.json"
OPTIONAL_FILES = (VOCAB, MERGES, TOKENIZER, TEMPLATE)
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
RECORD = "sha256.json"
MAX_HUB_FILE_BYTES = {  # bytes per file; weights are limited only by the disk
    CONFIG: 1_000_000,
    VOCAB: 64_000_000,
    MERGES: 64_000_000,
    TOKENIZER: 64_000_000,
    TEMPLATE: 1_000_000,
    INDEX: 10_000_000,
    RECORD: 10_000_000,
}
ACCESS_DENIED = (401, 403)
REPO_ID_PATTERN = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\w[\w.-]*)?", re.ASCII)
SHARD_PATTERN = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Repository:
    """Hub repository at a revision, with pinned file hashes."""

    name: str
    revision: str = "main"
    pins: Mapping[str, Pin] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}"


PINNED_REPOS = {
    "gpt2": Repository(
        "openai-community/gpt2",
        "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        {
            WEIGHTS: Pin(
                548_105_171, "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"
            ),
            CONFIG: Pin(665, "0daed7749b4f02b8f76240d5444551d7b08712dab4d0adb8239c56ba823bb7b4"),
            VOCAB: Pin(
                1_042_301, "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
            ),
            MERGES: Pin(
                456_318, "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
            ),
        },
    ),
    "gpt2-medium": Repository("openai-community/gpt2-medium"),
    "gpt2-large": Repository("openai-community/gpt2-large"),
    "gpt2-xl": Repository("openai-community/gpt2-xl"),
}


def is_repo_id(name: str) -> bool:
    """True for a public size or a syntactically valid hub name.

    >>> is_repo_id("gpt2"), is_repo_id("owner/name@v1"), is_repo_id("../x")
    (True, True, False)
    """
    return name in PINNED_REPOS or (
        REPO_ID_PATTERN.fullmatch(name) is not None and ".." not in name
    )


def resolve_repo(name: str) -> Repository:
    """Returns the repository of a public size or of "owner/name[@revision]"."""
    for known, entry in PINNED_REPOS.items():
        if name in (known, entry.name, str(entry)):
            return entry
    if not is_repo_id(name):
        raise ModelError(
            f"no model {name!r} on the hub.{did_you_mean(name, PINNED_REPOS)} Use one "
            f"of {', '.join(PINNED_REPOS)}, or owner/repository, optionally with "
            "@revision."
        )
    name, _, revision = name.partition("@")
    return Repository(name, revision or "main")


def fetch_repo(name: str, log: _LogFn = lambda line: None) -> Path:
    """Downloads the missing files of a repository and returns their folder.

    It contains config.json, tokenizer files and chat template if there are any, and
    model.safetensors or an index with its shards.

    Args:
        name: a public size such as "gpt2", "owner/name" or "owner/name@revision".
        log: receives messages for the user, one line each.

    Raises:
        ModelError: the repository does not exist or has no safetensors, or a file
            cannot be downloaded or does not match its hash.
    """
    repository = resolve_repo(name)
    folder = user_cache_dir("models").joinpath(*str(repository).split("/"))
    before = {**read_record(folder), **repository.pins}
    try:
        download_missing(repository, folder)
    finally:
        record = read_record(folder)
        if new := [file for file in record if record[file] and not before.get(file)]:
            log(
                f"{repository}: no hash is pinned for {', '.join(new)}; recorded at "
                f"first use in {folder / RECORD}, not verified"
            )
    return folder


def download_missing(repository: Repository, folder: Path) -> None:
    """Downloads missing files and verifies existing ones."""

    @functools.cache  # hashes each file only once
    def has(file: str) -> bool:
        return ensure_file(repository, folder, file)

    for file in [*MAX_HUB_FILE_BYTES, WEIGHTS, *read_record(folder)]:
        if file != RECORD and (folder / file).exists():
            has(file)
    if not has(CONFIG):
        raise ModelError(missing_file_message(repository, CONFIG))
    if not (has(VOCAB) and has(MERGES)):
        has(TOKENIZER)
    if not repository.pins:  # the public sizes have none
        has(TEMPLATE)
    if (folder / INDEX).exists() or not has(WEIGHTS):
        if not has(INDEX):
            raise ModelError(
                f"{repository} has no safetensors, and gptjax does not open pickles "
                "such as pytorch_model.bin. If you trust the repository, load it with "
                "transformers, call save_pretrained(DIR), and use DIR."
            )
        for shard in read_shards(folder / INDEX):
            if not has(shard):
                raise ModelError(missing_file_message(repository, shard))


def missing_file_message(repository: Repository, file: str) -> str:
    """Returns the error message for a file that is not on the hub."""
    return (
        f"{repository} has no {file} on the hub, and there is no local folder of this "
        "name. Check the name and the revision."
    )


def ensure_file(repository: Repository, folder: Path, file: str) -> bool:
    """Downloads or verifies a file; returns False if the repository lacks it."""
    path, record = folder / file, read_record(folder)
    pin = repository.pins.get(file) or record.get(file)
    if not path.exists():
        if file in record and not record[file]:
            return False
        if is_offline():
            if file in (VOCAB, MERGES) and (folder / TOKENIZER).exists():
                return False
            if file == TEMPLATE:
                return False
            raise ModelError(offline_message(repository, folder, file, record))
        found = fetch_file(repository, path, pin)
    else:
        found = pin_of(path)
        if pin and found != pin:
            source = "pinned are" if file in repository.pins else f"{RECORD} recorded"
            raise ModelError(
                f"{path} has {found.bytes} bytes with sha256 {found.sha256}, but "
                f"{source} {pin.bytes} bytes with sha256 {pin.sha256}. Delete the file "
                "to download it again, or replace it with the right one."
            )
    if not record.get(file) and (found or file in OPTIONAL_FILES):
        write_entry(folder, file, found)
    return found is not None


def offline_message(repository: Repository, folder: Path, file: str, record: Record) -> str:
    """Returns the error message for a missing file in offline mode."""
    files = [CONFIG, VOCAB, MERGES, *([] if (folder / INDEX).exists() else [WEIGHTS])]
    files = files if file in files else [file]
    needed = [f for f in files if record.get(f, "?") and not (folder / f).exists()]
    return (
        f"{file} of {repository} is not cached and GPTJAX_OFFLINE forbids downloads. "
        f"Copy {', '.join(needed or [file])} of {repository.name}, revision "
        f"{repository.revision}, to {folder}, or unset GPTJAX_OFFLINE."
    )


def pin_of(path: Path) -> Pin:
    """Returns the size and hash of a file."""
    try:
        return Pin(path.stat().st_size, sha256_of_files([path]))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}.") from error


def fetch_file(repository: Repository, path: Path, pin: Pin | None) -> Pin | None:
    """Downloads a file; returns its size and hash, or None if it is not on the hub."""
    name, revision, file = repository.name, repository.revision, path.name
    url = f"{read_endpoint()}/{name}/resolve/{revision}/{file}"
    remote = RemoteFile(url, pin, MAX_HUB_FILE_BYTES.get(file), read_token())
    try:
        found = download_file(remote, path, f"{file} of {repository}")
        return Pin(path.stat().st_size, found)
    except RemoteFileNotFoundError:
        return None
    except DataError as error:
        advice = ""
        if isinstance(error.__cause__, HTTPError) and error.__cause__.code in ACCESS_DENIED:
            advice = (
                f" The hub also answers this if {name} does not exist: check the name. "
                "Private and gated repositories need a token in HF_TOKEN."
            )
        elif pin and file not in repository.pins:
            advice = (
                f" If the repository has changed since its first use, delete "
                f"{path.parent} to start over."
            )
        raise ModelError(f"{error}{advice}") from error


def read_endpoint() -> str:
    """Returns the URL of the hub."""
    url = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if not re.fullmatch(r"https?://[\w.:\[\]-]+(/[\w./-]*)?", url, re.ASCII):
        harmless = re.sub(r"//.*@", "//…@", url)  # may contain a password
        raise ModelError(
            f"HF_ENDPOINT={harmless!r} is not the URL of a hub. Set it to a URL such "
            "as https://huggingface.co, or unset it."
        )
    return url.rstrip("/")


def read_token() -> str:
    """Returns the user's token, or "" if there is none."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch(r"[\x21-\x7e]*", token):  # never print the token
        raise ModelError(
            "HF_TOKEN contains whitespace or other invalid characters. Set it again or unset it."
        )
    return token


def read_shards(index: Path) -> list[str]:
    """Returns the shard names in an untrusted index."""
    fix = "Use another repository, or a folder with safetensors."
    try:
        shards = sorted(set(_read_cached_json(index, fix)["weight_map"].values()))
        wrong = [name for name in shards if not SHARD_PATTERN.fullmatch(name)]
    except (LookupError, TypeError, AttributeError) as error:
        raise _invalid_cache_file(index, f"it has no valid weight_map, {error!r}", fix) from error
    if wrong or not shards:
        raise _invalid_cache_file(index, f"{wrong[:1] or 'nothing'} is no valid shard name", fix)
    return shards


def read_record(folder: Path) -> Record:
    """Reads the file hashes recorded at first use."""
    path = folder / RECORD
    if not path.exists():
        return {}
    fix = "Delete it to record the hashes again at the next use."
    table = _read_cached_json(path, fix)
    try:
        return {
            file: None if entry is None else Pin(int(entry["bytes"]), entry["sha256"])
            for file, entry in table.items()
        }
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise _invalid_cache_file(path, f"it is not a table of hashes, {error!r}", fix) from error


def _read_cached_json(path: Path, fix: str) -> Any:
    """Reads a JSON file of limited size."""
    try:
        return strict_json.read_json(path, MAX_HUB_FILE_BYTES[path.name])
    except (OSError, ValueError) as error:
        raise _invalid_cache_file(path, error, fix) from error


def _invalid_cache_file(path: Path, why: Any, fix: str) -> ModelError:
    """Returns the error for an invalid file in the cache."""
    return ModelError(f"{path} cannot be used: {why}. {fix}")


def write_entry(folder: Path, file: str, found: Pin | None) -> None:
    """Adds the size and hash of a file to the record."""
    try:
        with open_part(folder / RECORD) as part:  # locked
            record = read_record(folder) | {file: found}
            table = {name: pin and pin._asdict() for name, pin in record.items()}
            part.seek(0)
            part.truncate()
            part.write(json.dumps(table, indent=2).encode() + b"\n")
            part.flush()
            os.fsync(part.fileno())
            os.replace(part.name, folder / RECORD)
    except OSError as error:
        raise ModelError(
            f"cannot write {folder / RECORD}: {error}. Make the folder writable or "
            "set GPTJAX_HOME to another one."
        ) from error
