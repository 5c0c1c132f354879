"""The tokenizer of a Hugging Face folder: loaded, and told apart from others."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_kto.errors import ConfigError, git_lfs_hint
from nemo_kto.quiet import is_global_rank_zero

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# One of these is present wherever transformers can build a tokenizer from files.
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


def import_without_torch() -> None:
    """Imports transformers as if torch were not installed, in a process that looks at data and does nothing else.

    Tokenizers and chat templates need none of it, yet transformers imports torch, its compiler and its distributed
    tensors before it loads one: two thirds of the time of `nemo-kto data check`. It looks for torch once and keeps the
    answer, so the process can use no model of transformers afterwards. Does nothing where either is loaded already.
    """
    if "torch" in sys.modules or "transformers" in sys.modules:
        return
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else it says that models will not be available
    sys.modules["torch"] = None  # type: ignore[assignment]  # Python's way of saying that there is no such module
    try:
        from transformers.utils.import_utils import is_torch_available

        assert not is_torch_available()
    finally:
        del sys.modules["torch"]


def check_tokenizer_folder(folder: Path) -> None:
    """Raises a ConfigError if there is no such folder, or no tokenizer in it; loads nothing."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; the tokenizer is read from a local Hugging Face folder.")
    # Checked here because transformers may build an empty tokenizer from a config.json alone.
    if not any((folder / name).is_file() for name in _VOCABULARY_FILES):
        raise ConfigError(f"{folder}: the folder has no tokenizer; expected one of {', '.join(_VOCABULARY_FILES)}.")


def load_tokenizer(
    path: str | Path, *, without_torch: bool = False, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a local Hugging Face folder; never looks anywhere else.

    Args:
        path: The folder.
        without_torch: See `import_without_torch`.
        trust_remote_code: Whether code in the folder may run; without, nobody is asked and nothing does.

    Raises:
        ConfigError: `path` is no folder, has no tokenizer files, needs code of its own that may not run, or
            transformers cannot read it.
    """
    folder = Path(path)
    check_tokenizer_folder(folder)
    if without_torch:
        import_without_torch()
    from transformers import AutoTokenizer, PreTrainedTokenizerBase  # only now: it takes longer than small data does
    from transformers.models.auto import tokenization_auto

    options: dict[str, bool] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    if hasattr(tokenization_auto, "_use_mistral_format"):
        # else a folder of Mistral's would be read otherwise where mistral-common is installed, as vLLM has it: by a
        # class that knows no chat template, and not even all methods of a tokenizer
        options["mistral_format"] = False
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # the readers behind it raise anything from KeyError to bare Exception
        if not trust_remote_code and has_own_code(folder / "tokenizer_config.json"):
            raise ConfigError(
                f"{folder}: the tokenizer needs code that is in the folder. If you trust whoever wrote it, set "
                "model.tokenizer.trust_remote_code=true (--trust-remote-code of nemo-kto data)."
            ) from error
        hint = next(filter(None, (git_lfs_hint(folder / name) for name in _VOCABULARY_FILES)), "")
        raise ConfigError(
            f"{folder}: the tokenizer cannot be loaded ({type(error).__name__}: {error}).{hint}"
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase), type(tokenizer)
    if type(tokenizer).__name__.startswith("MistralCommon"):
        raise ConfigError(
            f"{folder}: transformers {version('transformers')} reads this tokenizer by mistral-common, which knows no "
            "chat template. Take tekken.json out of the folder, if tokenizer.json is there too; or uninstall "
            "mistral-common."
        )
    template = processor_template(folder)
    if template is not None and template != tokenizer.chat_template:
        if tokenizer.chat_template is not None and is_global_rank_zero():
            logger.info(
                "%s: the chat template is the processor's, as at inference; the tokenizer has another.", folder
            )
        tokenizer.chat_template = template
    return tokenizer


def processor_template(folder: Path) -> str | dict[str, str] | None:
    """Returns the chat template that a folder has for its processor only; None if that takes the tokenizer's.

    Raises:
        ConfigError: A file that has it cannot be read.
    """
    for name in ("processor_config.json", "chat_template.json"):  # transformers' order
        file = folder / name
        if not file.is_file():
            continue
        try:
            template = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{file} is not a JSON object: {error}.{git_lfs_hint(file)}") from error
        if isinstance(template, dict) or (isinstance(template, str) and template):
            return template
    return None


def has_own_code(file: Path) -> bool:
    """Returns whether a configuration of transformers names classes in files beside it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and bool(content.get("auto_map"))


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of all that decides which tokens a tokenizer makes."""
    special = sorted(
        (number, str(token.content), token.special, token.lstrip, token.rstrip, token.single_word, token.normalized)
        for number, token in tokenizer.added_tokens_decoder.items()
    )
    versions = [version(name) for name in ("transformers", "tokenizers", "jinja2")]
    parts = [_backend(tokenizer), tokenizer.chat_template, special, tokenizer.special_tokens_map, versions]
    return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=16).hexdigest()


def _backend(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What is below the Python class: of a fast tokenizer its definition, of another one its files."""
    if tokenizer.is_fast:
        definition = json.loads(tokenizer.backend_tokenizer.to_str())
        # what is left of a tokenizer.json that was saved in use; the first call takes it away
        return [json.dumps({key: part for key, part in definition.items() if key not in ("truncation", "padding")})]
    files = [Path(tokenizer.name_or_path) / name for name in (*_VOCABULARY_FILES, "merges.txt")]
    contents = [hashlib.blake2b(file.read_bytes()).hexdigest() for file in files if file.is_file()]
    return [json.dumps(sorted(tokenizer.get_vocab().items())), *contents]
