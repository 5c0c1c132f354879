"""An exported folder, put on the Hugging Face Hub: what can be known to fail is found before anything is trained.

The token is the library's affair (HF_TOKEN, or `hf auth login`): it is never an option, and no message has it in it.
Nothing here imports torch.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from nemo_kto.errors import ConfigError, UploadError

STALE = [
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "adapter_model.bin"),
    *("config.json", "adapter_config.json"),
]
"""What goes from the repository if the folder has none of that name: it would be of two models else."""

_PATIENCE = 20.0
"""Seconds to wait for the Hub's first answer."""

_TOKEN = re.compile(r"hf_\w{16,}|://[^/@]*@")
"""What looks like a token, or an address with one in it."""

_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_IN_CACHE = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)")
_ADAPTER_CONFIG, _CARD = "adapter_config.json", "README.md"
_BASE_MODEL = re.compile(r"^base_model: .*\n", re.MULTILINE)


def check_repository(repository: str, *, private: bool, key: str) -> None:
    """Find out whether a folder could be uploaded now; writes nothing.

    Args:
        repository: `owner/name`, or `name` for the owner of the token.
        private: Whether nobody else may see it.
        key: The key or option that names it, for messages.

    Raises:
        ConfigError: The name is none, there is no token, it may not write there, the Hub cannot be reached, or the
            repository is there already and everybody sees it.
    """
    if _TOKEN.search(repository):
        raise ConfigError(f"{key} holds a token or a password. Name the repository, as owner/name, and set HF_TOKEN.")
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"{key}={repository} is no name of a repository: {_reason(error)}") from error
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"{key}={repository}: HF_HUB_OFFLINE is set. Unset it, or leave {key} out.")
    token = get_token()
    if token is None:
        raise ConfigError(f"{key}={repository} needs a token that may write. Set HF_TOKEN, or run `hf auth login`.")
    _check_account(repository, private, key, token, constants.ENDPOINT)


@cache  # a command asks when its configuration is judged, and again when it begins
def _check_account(repository: str, private: bool, key: str, token: str, endpoint: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    api = HfApi(endpoint=endpoint, token=token)

    def answer(question: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """Return what the Hub says; None if there is no such repository."""
        try:
            return question(*arguments, **keywords)
        except RepositoryNotFoundError:
            return None
        except HfHubHTTPError as error:
            if error.response.status_code != 401:
                raise _unreachable(key, repository, endpoint, error) from error
            raise ConfigError(f"{key}={repository}: the token is not valid. Make another that may write.") from error
        except Exception as error:  # of the library's HTTP client, which changes with its versions
            raise _unreachable(key, repository, endpoint, error) from error

    # first: no other question has a limit to how long it waits
    there = answer(api.model_info, repository, timeout=_PATIENCE)
    account = answer(api.whoami)
    access = (account.get("auth") or {}).get("accessToken") or {}
    if access.get("role") == "read":
        raise ConfigError(f"{key}={repository}: the token may only read. Make one that may write.")
    owner, sign, _ = repository.rpartition("/")
    owners = [account["name"], *(each["name"] for each in account.get("orgs") or ())]
    # one with chosen rights need not name all of those whose repositories it may write to
    if sign and access.get("role") == "write" and owner not in owners:
        raise ConfigError(f"{key}={repository}: the token is of {account['name']}, who may not write for {owner}.")
    if not sign:
        there = answer(api.model_info, f"{account['name']}/{repository}")
    if private and there is not None and not there.private:
        raise ConfigError(
            f"{key}={repository} is there already, and everybody sees it. Set export.hub_private=false (--public) to "
            "upload to it all the same, or name another."
        )


def _unreachable(key: str, repository: str, endpoint: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"{key}={repository}: {endpoint} cannot be reached from here ({_reason(error)}). Leave {key} out, and use "
        "`nemo-kto export-hf --push-to-hub` later on a machine that can."
    )


def upload(folder: Path, repository: str, *, private: bool, later: str) -> str:
    """Make the repository, if it is not there, and replace what is in it; return its address.

    Args:
        folder: What is uploaded.
        repository: See `check_repository`.
        private: See `check_repository`.
        later: What to do if it cannot be done now, as a sentence.

    Raises:
        UploadError: It could not be done; the folder stays as it is.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi()
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.model_info(made.repo_id).private:
            raise PermissionError("it is there already, and everybody sees it")
        with _published(folder) as shown:
            api.upload_folder(
                repo_id=made.repo_id,
                folder_path=shown,
                commit_message="Upload what was aligned with nemo_kto",
                delete_patterns=STALE,
            )
    except Exception as error:  # of the library, its HTTP client and its transfers
        raise UploadError(
            f"{folder} is complete, but could not be uploaded to {repository}: {_reason(error)}. {later}"
        ) from error
    return f"{constants.ENDPOINT}/{made.repo_id}"


@contextmanager
def _published(folder: Path) -> Iterator[Path]:
    """Return the folder as others are to see it: an adapter's base model by its name on the Hub, not by a path."""
    file = folder / _ADAPTER_CONFIG
    if not file.is_file():
        yield folder
        return
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    base = base_name(str(settings["base_model_name_or_path"]))
    with tempfile.TemporaryDirectory(prefix="nemo_kto_hub_") as name:
        shown = Path(name)
        for path in folder.rglob("*"):
            place = shown / path.relative_to(folder)
            place.mkdir() if path.is_dir() else place.symlink_to(path.absolute())
        _replace(shown / _ADAPTER_CONFIG, json.dumps({**settings, "base_model_name_or_path": base}, indent=2) + "\n")
        card = folder / _CARD
        if card.is_file():
            # the Hub refuses a card that names what can be no model
            line = f'base_model: "{base}"\n' if _ID.fullmatch(base) else ""
            _replace(shown / _CARD, _BASE_MODEL.sub(line, card.read_text(encoding="utf-8"), count=1))
        yield shown


def _replace(link: Path, text: str) -> None:
    link.unlink()
    link.write_text(text, encoding="utf-8")


def base_name(folder: str) -> str:
    """Return what others call the model in a folder: its name on the Hub if it is in the Hub's cache, else its own."""
    found = _IN_CACHE.search(folder)
    return f"{found['owner']}/{found['name']}" if found else Path(folder).name


def _reason(error: BaseException) -> str:
    """Return why, in one line without a full stop, and without the token."""
    from huggingface_hub import get_token

    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines) or type(error).__name__
    token = get_token()
    return (text if token is None else text.replace(token, "<token>")).rstrip(".")
