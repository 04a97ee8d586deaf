"""The files of a Hugging Face hub repository: kept in the cache, checked at each use.

A file is compared with the hash that is pinned here, else with the one that it had
when it was first used, which sha256.json beside it records. Weights are taken as
safetensors only.
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

from gptjax import strict_json
from gptjax.config import suggestion
from gptjax.download import (
    AbsentError,
    Pin,
    Remote,
    cache_folder,
    download,
    offline,
    open_part,
    sha256,
)
from gptjax.errors import DataError, ModelError
from gptjax.template import FILE as TEMPLATE

Say = Callable[[str], None]
Record = dict[str, Pin | None]  # None = the repository does not have the file

CONFIG, VOCAB, MERGES = "config.json", "vocab.json", "merges.txt"
TOKENIZER = "tokenizer.json"
OPTIONAL = (VOCAB, MERGES, TOKENIZER, TEMPLATE)
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
RECORD = "sha256.json"
MOST = {  # bytes; the numbers have no other limit than the disk
    CONFIG: 1_000_000,
    VOCAB: 64_000_000,
    MERGES: 64_000_000,
    TOKENIZER: 64_000_000,
    TEMPLATE: 1_000_000,
    INDEX: 10_000_000,
    RECORD: 10_000_000,
}
DENIED = (401, 403)
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\w[\w.-]*)?", re.ASCII)
SHARD = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Repository:
    """Where files are on the hub, and what is known of them."""

    name: str
    revision: str = "main"
    pins: Mapping[str, Pin] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}"


KNOWN = {
    "gpt2": Repository(
        "openai-community/gpt2",
        "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        {
            WEIGHTS: Pin(
                548_105_171,
                "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
            ),
            CONFIG: Pin(
                665, "0daed7749b4f02b8f76240d5444551d7b08712dab4d0adb8239c56ba823bb7b4"
            ),
            VOCAB: Pin(
                1_042_301,
                "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
            ),
            MERGES: Pin(
                456_318,
                "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            ),
        },
    ),
    "gpt2-medium": Repository("openai-community/gpt2-medium"),
    "gpt2-large": Repository("openai-community/gpt2-large"),
    "gpt2-xl": Repository("openai-community/gpt2-xl"),
}


def is_repository(name: str) -> bool:
    """Whether a name is a public size or could be one of the hub.

    >>> is_repository("gpt2"), is_repository("owner/name@v1"), is_repository("../x")
    (True, True, False)
    """
    return name in KNOWN or (
        REPOSITORY.fullmatch(name) is not None and ".." not in name
    )


def find(name: str) -> Repository:
    """The repository of a public size, or of "owner/name" or "owner/name@revision"."""
    for known, entry in KNOWN.items():
        if name in (known, entry.name, str(entry)):
            return entry
    if not is_repository(name):
        raise ModelError(
            f"no model {name!r} on the hub.{suggestion(name, KNOWN)} Name one of "
            f"{', '.join(KNOWN)}, or owner/repository, with @revision where wanted."
        )
    name, _, revision = name.partition("@")
    return Repository(name, revision or "main")


def fetch(name: str, say: Say = lambda line: None) -> Path:
    """The folder with the files of a repository, downloaded where they are not yet.

    It holds config.json, the tokenizer's files and the chat template if there are any,
    and model.safetensors or the index and the shards that it names.

    Args:
        name: a public size such as "gpt2", or "owner/name", or "owner/name@revision".
        say: gets what a person should know, a line at a time.

    Raises:
        ModelError: no such repository, no safetensors in it, a file that cannot be
            downloaded, or one that is not what it was.
    """
    repository = find(name)
    folder = cache_folder("models").joinpath(*str(repository).split("/"))
    before = {**read_record(folder), **repository.pins}
    try:
        fill(repository, folder)
    finally:
        record = read_record(folder)
        if new := [file for file in record if record[file] and not before.get(file)]:
            say(
                f"{repository}: no hash is pinned for {', '.join(new)}; recorded on "
                f"first use in {folder / RECORD}, not compared"
            )
    return folder


def fill(repository: Repository, folder: Path) -> None:
    """Downloads what the folder lacks, and checks what it has."""

    @functools.cache  # a file is hashed once
    def has(file: str) -> bool:
        return open_file(repository, folder, file)

    for file in [*MOST, WEIGHTS, *read_record(folder)]:
        if file != RECORD and (folder / file).exists():
            has(file)
    if not has(CONFIG):
        raise ModelError(lacking(repository, CONFIG))
    if not (has(VOCAB) and has(MERGES)):
        has(TOKENIZER)
    if not repository.pins:  # the public sizes have none
        has(TEMPLATE)
    if (folder / INDEX).exists() or not has(WEIGHTS):
        if not has(INDEX):
            raise ModelError(
                f"{repository} has no safetensors, and gptjax opens no pickle such as "
                "pytorch_model.bin. Convert it where you trust it: load it with "
                "transformers, save_pretrained(DIR), and name DIR."
            )
        for shard in read_shards(folder / INDEX):
            if not has(shard):
                raise ModelError(lacking(repository, shard))


def lacking(repository: Repository, file: str) -> str:
    """What to say where the hub does not have a file."""
    return (
        f"{repository} has no {file} on the hub, nor is there such a folder on this "
        "machine. Check the name and the revision."
    )


def open_file(repository: Repository, folder: Path, file: str) -> bool:
    """Whether the repository has a file; if so, it is in the folder, and checked."""
    path, record = folder / file, read_record(folder)
    pin = repository.pins.get(file) or record.get(file)
    if not path.exists():
        if file in record and not record[file]:
            return False
        if offline():
            if file in (VOCAB, MERGES) and (folder / TOKENIZER).exists():
                return False
            if file == TEMPLATE:
                return False
            raise ModelError(what_to_copy(repository, folder, file, record))
        found = fetch_file(repository, path, pin)
    else:
        found = measured(path)
        if pin and found != pin:
            source = "pinned are" if file in repository.pins else f"{RECORD} recorded"
            raise ModelError(
                f"{path} has {found.bytes} bytes with sha256 {found.sha256}, but "
                f"{source} {pin.bytes} bytes with sha256 {pin.sha256}. Remove the file "
                "to download it again, or put the right one there."
            )
    if not record.get(file) and (found or file in OPTIONAL):
        write_entry(folder, file, found)
    return found is not None


def what_to_copy(
    repository: Repository, folder: Path, file: str, record: Record
) -> str:
    """What to say where a file is missing and the network is forbidden."""
    files = [CONFIG, VOCAB, MERGES, *([] if (folder / INDEX).exists() else [WEIGHTS])]
    files = files if file in files else [file]
    needed = [f for f in files if record.get(f, "?") and not (folder / f).exists()]
    return (
        f"{file} of {repository} is not on this machine and GPTJAX_OFFLINE forbids its "
        f"download. Copy {', '.join(needed or [file])} of {repository.name}, revision "
        f"{repository.revision}, to {folder}, or unset GPTJAX_OFFLINE."
    )


def measured(path: Path) -> Pin:
    """What a file is."""
    try:
        return Pin(path.stat().st_size, sha256([path]))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}.") from error


def fetch_file(repository: Repository, path: Path, pin: Pin | None) -> Pin | None:
    """Downloads a file and returns what it is; None where the hub does not have it."""
    name, revision, file = repository.name, repository.revision, path.name
    url = f"{read_endpoint()}/{name}/resolve/{revision}/{file}"
    remote = Remote(url, pin, MOST.get(file), read_token())
    try:
        found = download(remote, path, f"{file} of {repository}")
        return Pin(path.stat().st_size, found)
    except AbsentError:
        return None
    except DataError as error:
        advice = ""
        if isinstance(error.__cause__, HTTPError) and error.__cause__.code in DENIED:
            advice = (
                f" The hub answers so where there is no {name}, too: check the name. "
                "What is private or gated needs a token in HF_TOKEN."
            )
        elif pin and file not in repository.pins:
            advice = (
                f" If the repository has changed since its first use, remove "
                f"{path.parent} to begin anew."
            )
        raise ModelError(f"{error}{advice}") from error


def read_endpoint() -> str:
    """The address of the hub."""
    url = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if not re.fullmatch(r"https?://[\w.:\[\]-]+(/[\w./-]*)?", url, re.ASCII):
        harmless = re.sub(r"//.*@", "//…@", url)  # it may hold a password
        raise ModelError(
            f"HF_ENDPOINT={harmless!r} is no address of a hub. Set it to one such as "
            "https://huggingface.co, or unset it."
        )
    return url.rstrip("/")


def read_token() -> str:
    """The user's token, or nothing."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch(r"[\x21-\x7e]*", token):  # the token itself is not for a screen
        raise ModelError(
            "HF_TOKEN has blanks or other characters that no token has. Set it again, "
            "or unset it."
        )
    return token


def read_shards(index: Path) -> list[str]:
    """Names of the shards in an index that nobody vouches for."""
    fix = "Name another repository, or a folder with safetensors."
    try:
        shards = sorted(set(read_json(index, fix)["weight_map"].values()))
        wrong = [name for name in shards if not SHARD.fullmatch(name)]
    except (LookupError, TypeError, AttributeError) as error:
        raise unusable(index, f"it has no proper weight_map, {error!r}", fix) from error
    if wrong or not shards:
        raise unusable(index, f"{wrong[:1] or 'nothing'} is no name of a shard", fix)
    return shards


def read_record(folder: Path) -> Record:
    """What the files were at their first use."""
    path = folder / RECORD
    if not path.exists():
        return {}
    fix = "Remove it, and the hashes are recorded anew at the next use."
    table = read_json(path, fix)
    try:
        return {
            file: None if entry is None else Pin(int(entry["bytes"]), entry["sha256"])
            for file, entry in table.items()
        }
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise unusable(path, f"it is no table of hashes, {error!r}", fix) from error


def read_json(path: Path, fix: str) -> Any:
    """The content of a JSON file of bounded size."""
    try:
        return strict_json.read_json(path, MOST[path.name])
    except (OSError, ValueError) as error:
        raise unusable(path, error, fix) from error


def unusable(path: Path, why: Any, fix: str) -> ModelError:
    """The error for a damaged file in the cache."""
    return ModelError(f"{path} cannot be used: {why}. {fix}")


def write_entry(folder: Path, file: str, found: Pin | None) -> None:
    """Adds to the record what a file is."""
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
            f"cannot write {folder / RECORD}: {error}. Make the folder writable, or "
            "set GPTJAX_HOME to another."
        ) from error
