"""A folder goes to a hub, through the hub's own client and its own login."""

from __future__ import annotations

from pathlib import Path

from labeltune.errors import ConfigError, HubError, first_line
from labeltune.io.outputs import is_hub_name


def check_repo(spec: str) -> None:
    """Raise ConfigError unless `spec` is `hf:org/name` or `ms:org/name`."""
    parts = spec[3:].split("/")
    if not is_hub_name(spec) or len(parts) != 2 or not all(parts):
        raise ConfigError(f"--push {spec}: write hf:org/name (Hugging Face) or ms:org/name (ModelScope)")


def push_folder(folder: Path, spec: str) -> str:
    """Upload a folder into a model repository, which is made (private) when there is none.

    Args:
        spec: `hf:org/name` or `ms:org/name`.

    Returns:
        Its address.

    Raises:
        HubError: the hub cannot be reached, or refuses.
    """
    repo = spec[3:]
    message = "Upload by labeltune export"
    name = "Hugging Face" if spec.startswith("hf:") else "ModelScope"
    try:
        if spec.startswith("hf:"):
            from huggingface_hub import HfApi

            hf = HfApi()
            hf.create_repo(repo, private=True, repo_type="model", exist_ok=True)
            hf.upload_folder(repo_id=repo, folder_path=folder, repo_type="model", commit_message=message)
            return f"https://huggingface.co/{repo}"
        from modelscope.hub.api import HubApi

        ms = HubApi()
        ms.create_repo(repo, visibility="private", repo_type="model", exist_ok=True)
        ms.upload_folder(repo, folder, repo_type="model", commit_message=message)
        return f"https://modelscope.cn/models/{repo}"
    except Exception as error:
        login = "hf auth login" if spec.startswith("hf:") else "modelscope login"
        raise HubError(
            f"{repo} could not be pushed to {name} ({first_line(error)}). The export itself is complete in {folder}; "
            f"check the name, your login ({login}) and the network"
        ) from error
