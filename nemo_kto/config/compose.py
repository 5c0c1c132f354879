"""From conf/gpt_kto.yaml and overrides to a checked configuration, before anything heavy is imported.

`parse_config` turns what Hydra composed into the classes of `schema.py` and refuses what it does not know, naming the
nearest key. Keys of NeMo-Aligner that no longer mean anything are accepted with one warning; those whose feature does
not exist yet are refused unless they are neutral.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import hydra.version
import yaml
from hydra._internal import utils as hydra_utils
from hydra._internal.sources_registry import SourcesRegistry
from hydra._internal.utils import _run_hydra, get_args_parser  # what NeMo's hydra_runner calls too
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_kto.config import sweeps
from nemo_kto.config.checks import check_values
from nemo_kto.config.folders import RECIPE, config_dir
from nemo_kto.config.legacy import take_legacy_keys
from nemo_kto.config.overrides import check_readable, quoted, readable
from nemo_kto.config.reader import build, flatten, leaf_values, unknown_key_message
from nemo_kto.config.schema import KTOConfig
from nemo_kto.errors import ConfigError, run_guarded
from nemo_kto.quiet import is_global_rank_zero

logger = logging.getLogger(__name__)

_CONFIG_NAME = "gpt_kto"
_HYDRA_SETTINGS = (
    "hydra.output_subdir=null",
    "hydra/job_logging=stdout",
    "hydra.run.dir=.",
    "hydra.job.chdir=false",  # which Hydra's launchers do not know in processes of their own
    *sweeps.SETTINGS,
)
"""What NeMo's hydra_runner sets too: a run writes nothing into the folder that it is called in."""


def load_config(overrides: Sequence[str] | Mapping[str, Any] = ()) -> KTOConfig:
    """Return the configuration of conf/gpt_kto.yaml with overrides.

    Args:
        overrides: As on the command line, `["model.optim.lr=1e-6", "trainer.devices=2"]`; or key -> value,
            `{"model.optim.lr": 1e-6, "trainer.devices": 2}`, which nothing has to be quoted for: values are taken as
            they are, paths as text.

    Raises:
        ConfigError: See `parse_config`; or an override is not written as Hydra reads it.
    """
    if isinstance(overrides, str):
        raise ConfigError(f"The overrides {overrides!r} are no list. Write [{overrides!r}].")
    values = dict(overrides) if isinstance(overrides, Mapping) else {}
    recipe = [f"{RECIPE}={values.pop(RECIPE)}"] if RECIPE in values else []
    written = [readable(override) for override in (recipe if isinstance(overrides, Mapping) else overrides)]
    check_readable(written)
    try:
        with hydra.initialize_config_dir(str(config_dir()), version_base=None):
            raw = hydra.compose(_CONFIG_NAME, written)
    except HydraException as error:
        _refuse_to_compose(error)
    plain = _resolved(raw)
    for key, value in values.items():
        _set(plain, str(key), _plain(value))
    return _checked(plain)


def _set(node: dict[str, Any], key: str, value: Any) -> None:
    """Set a value of nested mappings by its dotted key."""
    name, _, rest = key.partition(".")
    if not rest:
        node[name] = value
        return
    if not isinstance(node.get(name), dict):
        node[name] = {}
    _set(node[name], rest, value)


def _plain(value: Any) -> Any:
    """Return a value as YAML would have it: paths as text, sequences as lists."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def run_configured(
    action: Callable[[KTOConfig], None],
    overrides: Sequence[str],
    *,
    around: Callable[[DictConfig], AbstractContextManager[None]] = lambda raw: nullcontext(),
) -> None:
    """Run `action` with the configuration from conf/gpt_kto.yaml and `overrides` of the command line.

    Hydra's own options (`--config-path`, `--config-name`, `--cfg job`, `--multirun` ...) work among the overrides.
    NeMo's `hydra_runner` does the same, but imports NeMo, and PyTorch with it, before a misspelt key is found.

    Args:
        action: What to run.
        overrides: Of the command line.
        around: Returns what the judgement of a composed configuration and `action` happen in.
    """

    def act(raw: DictConfig) -> None:
        # Hydra turns exceptions into its own report: ours must not reach it
        run_guarded(lambda: start(raw))

    def start(raw: DictConfig) -> None:
        with around(raw):
            config = parse_config(raw)
            sweeps.in_own_folder(config, of_all)
            action(config)

    hydra.version.setbase(None)
    parser = get_args_parser()
    several = bool({"--multirun", "-m"} & set(overrides))
    # overrides may stand on both sides of an option
    options = parser.parse_intermixed_args([readable(argument, sweeps=several) for argument in overrides])
    run_guarded(partial(check_readable, options.overrides))
    of_all = sweeps.keys_of_all(options.overrides)
    if several:
        sweeps.prepare_jobs()
    # first, so that what a user says of Hydra counts
    options.overrides = [*_HYDRA_SETTINGS, f"hydra.job.name={quoted(Path(sys.argv[0]).stem)}", *options.overrides]
    with _files_explained(), _errors_explained():
        _run_hydra(
            args=options,
            args_parser=parser,
            task_function=act,
            config_path=str(config_dir()),
            config_name=_CONFIG_NAME,
        )


@contextmanager
def _files_explained() -> Iterator[None]:
    """Say in one sentence where a YAML file cannot be read; Hydra prints the traceback of whoever reads it."""
    Plugins.instance()  # finds and registers what reads files: not the class that can be imported, but another like it
    source: Any = SourcesRegistry.instance().resolve("file")
    original = source.load_config

    def load(self: Any, config_path: str) -> Any:
        try:
            return original(self, config_path)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            file = Path(os.path.realpath(Path(self.path) / self._normalize_file_name(config_path)))
            run_guarded(partial(_refuse, file, error))

    source.load_config = load
    try:
        yield
    finally:
        source.load_config = original


def _refuse(file: Path, error: Exception) -> None:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is not None:
        line, column = mark.line + 1, mark.column + 1
    else:  # of bytes or characters that no text consists of, found before there are lines
        before = _readable_part(file)
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        problem = "this is no text in UTF-8" if isinstance(error, UnicodeDecodeError) else "a control character"
    raise ConfigError(f"{file}, line {line}, column {column}: this cannot be read as YAML: {problem}.") from error


@contextmanager
def _errors_explained() -> Iterator[None]:
    """Say in one sentence what Hydra does not find or cannot compose; it prints several lines and no name of a key."""
    utils: Any = hydra_utils
    original = utils.run_and_report

    def report(function: Callable[[], Any]) -> Any:
        def explained() -> Any:
            try:
                return function()
            except HydraException as error:
                run_guarded(partial(_refuse_to_compose, error))

        return original(explained)

    utils.run_and_report = report
    try:
        yield
    finally:
        utils.run_and_report = original


def _refuse_to_compose(error: HydraException) -> None:
    text, _, rest = str(error).partition("\n\n")
    place = re.search(r"provider=main, path=file://(.*)", rest)
    looked = f" It was looked for in {place[1]}." if place else ""
    options = re.search(r"Available options in '.*?':\n((?:\t.*\n?)+)", rest)
    looked += f" There are: {', '.join(options[1].split())}." if options else ""
    cause = f" ({_first_line(error.__cause__)})" if isinstance(error.__cause__, OmegaConfBaseException) else ""
    found = " ".join(text.split())
    raise ConfigError(
        f"The configuration cannot be put together: {found}{'.' * bool(options)}{cause}{looked}"
    ) from error


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]


def _readable_part(file: Path) -> str:
    """Return what a file begins with, up to what YAML takes for no text."""
    content = file.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        text = content[: error.start].decode("utf-8")
    found = yaml.reader.Reader.NON_PRINTABLE.search(text)
    return text if found is None else text[: found.start()]


# what configurations can say besides `${key}`, the first two as with NeMo's hydra_runner; here, so that it is known
# where a launcher of Hydra's has sent a run to, too
OmegaConf.register_new_resolver("multiply", lambda x, y: x * y, replace=True)
OmegaConf.register_new_resolver("sum", lambda x, y: x + y, replace=True)
OmegaConf.register_new_resolver("log_folder", sweeps.sweep_folder, replace=True)


def parse_config(raw: DictConfig | Mapping[str, Any]) -> KTOConfig:
    """Return the typed configuration of a run.

    Args:
        raw: What Hydra composed from conf/gpt_kto.yaml and the command line, or the same as plain mappings; missing
            keys take their defaults.

    Raises:
        ConfigError: A key is unknown, or a value has the wrong type or is impossible.
    """
    return _checked(_resolved(raw))


def _resolved(raw: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Return plain mappings with every `${...}` replaced."""
    try:
        plain = OmegaConf.to_container(OmegaConf.create(dict(raw)), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{error.full_key or 'The configuration'} cannot be resolved: {_first_line(error)}"
        ) from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _checked(plain: Mapping[str, Any]) -> KTOConfig:
    """Return the typed configuration of plain mappings; see `parse_config`."""
    defaults = leaf_values(KTOConfig())
    flat, ignored = take_legacy_keys(flatten(plain, defaults), defaults)
    for key in flat:
        if key not in defaults:
            raise ConfigError(unknown_key_message(key, defaults))
    if ignored and is_global_rank_zero():
        logger.warning("These keys change nothing here and are ignored: %s", ", ".join(ignored))
    config: KTOConfig = build(KTOConfig, flat)
    config.trainer.precision = _canonical_precision(config.trainer.precision)
    callback = config.exp_manager.checkpoint_callback_params
    callback.monitor = callback.monitor.replace("/", "_")  # val/loss in the logs, val_loss in file names
    check_values(config)
    return config


_PRECISIONS: dict[int | str, tuple[str, ...]] = {
    32: ("32", "32-true", "fp32"),
    "bf16-mixed": ("bf16-mixed", "bf16"),
    "16-mixed": ("16-mixed", "16", "fp16"),
}
"""What `trainer.precision` becomes -> the ways NeMo and Lightning write it."""


def _canonical_precision(given: int | str) -> int | str:
    for canonical, spellings in _PRECISIONS.items():
        if str(given) in spellings:
            return canonical
    raise ConfigError(f"trainer.precision={given} is not available. Use one of {', '.join(map(str, _PRECISIONS))}.")
