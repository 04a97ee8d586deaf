"""Uploads a folder to the Hugging Face hub, in one commit."""

import re
from pathlib import Path

from gptjax.errors import GptjaxError, ModelError, ResourceError
from gptjax.fileio.download import is_offline
from gptjax.runtime.terminal import redact_secrets
from gptjax.weights.hub import REPO_ID_PATTERN


def check_repo_id(name: str) -> None:
    """Raises ModelError unless `name` is an "owner/name" without a revision."""
    if not REPO_ID_PATTERN.fullmatch(name) or "@" in name or ".." in name:
        raise ModelError(f"{name!r} is not the name of a repository. Write it as OWNER/NAME.")


def upload_folder(folder: Path, repo_id: str, *, private: bool) -> str:
    """Creates the repository if need be, uploads the files, and returns its address."""
    import huggingface_hub

    check_repo_id(repo_id)
    if is_offline() or huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ModelError("GPTJAX_OFFLINE or HF_HUB_OFFLINE forbids uploads. Unset it.")
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        message = "Upload a model of gptjax"
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
    except Exception as error:  # of HTTP clients and Xet, without a common base class
        raise to_upload_error(repo_id, error) from error
    return str(address)


def to_upload_error(repo_id: str, error: Exception) -> GptjaxError:
    """Returns the error of a failed upload, without passwords in URLs."""
    import huggingface_hub

    token, reason = huggingface_hub.get_token() or "", error.__cause__ or error
    status = getattr(getattr(reason, "response", None), "status_code", 0)
    if status in (401, 403, 404):
        return ModelError(
            f"no write access to {repo_id} on the hub. Check the name, and run `hf auth login` "
            "with a token that may write, or set HF_TOKEN."
        )
    text = redact_secrets(re.sub("//[^/ ]*@", "//", str(reason).partition("\n")[0]), token)
    return ResourceError(
        f"cannot upload to {repo_id}: {text}. Check the network and run the same command again."
    )
