"""The command `nemo-kto` and the scripts of examples/: arguments only, each command is imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_kto import stopping
from nemo_kto.commands.examples import add_examples
from nemo_kto.errors import run_guarded
from nemo_kto.quiet import silence_loaded_packages, silence_startup_noise, without_wandb

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from omegaconf import DictConfig

    from nemo_kto.config.schema import KTOConfig


_SCRIPTS = ("train", "evaluate")
"""Commands that are those of the scripts in examples/."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `nemo-kto`.

    Args:
        arguments: What follows the command's name; None for what this process was called with, which is then the
            command's own.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if words and words[0] in _SCRIPTS and not {"-h", "--help"} & set(words):
        run_script(words[0], words[1:])  # Hydra parses what follows, also its own options
        return
    options = _parser().parse_args(words)
    options.own_process = arguments is None
    run_guarded(lambda: options.run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nemo-kto", description="Tools around KTO training on Megatron-Core.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_scripts(commands)
    export = commands.add_parser(
        "export-hf",
        help="write a checkpoint as a Hugging Face folder",
        description="Write the weights of a checkpoint, saved under any parallel layout, as a Hugging Face folder "
        "with tokenizer and chat template.",
    )
    export.add_argument("checkpoint", type=Path, help="checkpoint folder: <log dir>/checkpoints/<name>")
    export.add_argument("folder", type=Path, help="folder to create")
    export.add_argument(
        "--merge", action="store_true", help="of a run with LoRA, write the whole model instead of an adapter for PEFT"
    )
    export.add_argument(
        "--merge-into-original",
        action="store_true",
        help="--merge, into the model's own weights where training had them in fewer bits",
    )
    export.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights; auto, the default: that of the folder training started from",
    )
    export.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the folder to the Hugging Face Hub")
    export.add_argument("--public", action="store_true", help="let everybody see it there")
    export.set_defaults(run=_command("export"))
    cache = commands.add_parser(
        "cache-reference",
        help="compute the reference's log-probs that a training run will look up",
        description="Score the data of a run with its reference policy and keep the log-probs on disk. Takes the keys "
        "of that run's command line; model.kto.reference.mode=cached is implied, the parallel layout may be another.",
    )
    cache.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of conf/gpt_kto.yaml")
    cache.set_defaults(run=_cache_reference)
    _add_generate(commands)
    report = commands.add_parser(
        "report",
        help="show a run, or several beside each other, as a page with pictures",
        description="Write report.html, which works offline, and its pictures as PNG files: curves, data, generations "
        "and configuration of a run. Several runs are overlaid and compared.",
    )
    report.add_argument("log_dirs", nargs="+", type=Path, metavar="LOG_DIR", help="log folder of a run")
    report.add_argument(
        "--output", "-o", type=Path, metavar="FOLDER", help="folder to write to; default, of one run: <log dir>/report"
    )
    report.set_defaults(run=_command("report"))
    _add_plan(commands)
    _add_data_commands(commands)
    _add_checkpoint_commands(commands)
    doctor = commands.add_parser(
        "doctor",
        help="look for what would stop a long job",
        description="Look at versions, devices, model folder, layout, the first records of the data, the log folder "
        "and its disk, as a run with these keys would find them. The exit code is 1 if something is wrong.",
    )
    doctor.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of conf/gpt_kto.yaml")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_command("doctor"))
    _add_help_commands(commands, parser)
    add_examples(parser)
    return parser


def _add_scripts(commands: Any) -> None:
    for name, text, more in (
        ("train", "train a model with KTO", "from the Hugging Face folder to the exported one"),
        ("evaluate", "score held-out feedback with a checkpoint of a run", "with the keys of that run's command line"),
    ):
        script = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}, {more}. Options of Hydra are taken too, such as --multirun and "
            "--config-path; `nemo-kto config` explains the keys.",
        )
        script.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of conf/gpt_kto.yaml")


def _add_help_commands(commands: Any, parser: argparse.ArgumentParser) -> None:
    keys = commands.add_parser(
        "config",
        help="say what the keys of the configuration mean",
        description="Print what a key of conf/gpt_kto.yaml means, which values it takes, and its default; or of every "
        "key in a section.",
    )
    keys.add_argument("key", nargs="?", metavar="KEY", help="key, or section such as model.kto; default: all keys")
    keys.add_argument("--json", action="store_true", help="print JSON")
    keys.set_defaults(run=_command("keys"))
    completion = commands.add_parser(
        "completion",
        help="print what lets a shell complete commands, keys and values",
        description="Print a script for a shell, which then completes commands, options, keys of the configuration "
        "and the values of those that only take some.",
    )
    completion.add_argument("shell", choices=("bash", "zsh"), help="which one")
    completion.set_defaults(run=_command("completion"), parser=parser)


def _add_checkpoint_commands(commands: Any) -> None:
    checkpoint = commands.add_parser(
        "checkpoint", help="list a run's checkpoints, or compare them with what was written"
    )
    actions = checkpoint.add_subparsers(required=True, metavar="ACTION")
    for name, function, text in (
        ("list", "list_checkpoints", "list the checkpoints of a run, judged by the sizes of their files"),
        ("verify", "verify", "read the checkpoints of a run; the exit code is 1 if a file is not what was written"),
    ):
        action = actions.add_parser(name, help=text, description=f"{text.capitalize()}.")
        action.add_argument("log_dir", type=Path, metavar="LOG_DIR", help="log folder of a run")
        action.add_argument("--json", action="store_true", help="print JSON")
        action.set_defaults(run=_command("checkpoint", function))


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="say which layout suits a model and GPUs, and what it takes",
        description="Look for the layouts that fit a model on GPUs that need not be at hand, and print the best with "
        "the memory and time that a step takes. The exit code is 1 if none fits.",
    )
    plan.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of conf/gpt_kto.yaml")
    plan.add_argument("--model", type=Path, required=True, metavar="PATH", help="Hugging Face folder, or config.json")
    plan.add_argument("--gpus", type=_positive, metavar="N", help="how many there are; of a recipe as many as it says")
    plan.add_argument("--nodes", type=_positive, metavar="N", help="in how many nodes; default: eight GPUs in each")
    plan.add_argument("--gpu", choices=("a100", "h100", "h200", "b200"), default="h100", help="what they are")
    plan.add_argument(
        "--gpu-memory", type=float, metavar="GIB", help="memory of each, if it is another than that GPU's"
    )
    plan.add_argument("--layout", metavar="tp=N,pp=N,...", help="take this layout instead of looking for the best")
    plan.add_argument("--lora", action="store_true", help="train adapters: model.peft.peft_scheme=lora")
    plan.add_argument(
        "--quantize",
        choices=("nf4", "int8"),
        help="that, beside a model in four or eight bits: model.peft.quantize_base",
    )
    plan.add_argument("--reference", metavar="MODE", help="model.kto.reference.mode")
    plan.add_argument(
        "--seq-length", type=_positive, metavar="TOKENS", help="model.data.seq_length, the longest document"
    )
    plan.add_argument("--mean-length", type=_positive, metavar="TOKENS", help="of a document; default: as the longest")
    plan.add_argument("--global-batch-size", type=_positive, metavar="DOCUMENTS", help="model.global_batch_size")
    plan.add_argument(
        "--precision", default="bf16-mixed", metavar="NAME", help="trainer.precision; default: bf16-mixed"
    )
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(run=_command("plan"))
    recipes = commands.add_parser(
        "recipes",
        help="list configurations for common models",
        description="List the configurations for common models and GPUs, which recipe=NAME takes among the overrides.",
    )
    recipes.add_argument("name", nargs="?", metavar="NAME", help="print this one")
    recipes.add_argument("--json", action="store_true", help="print JSON")
    recipes.set_defaults(run=_command("recipes"))


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser(
        "generate",
        help="answer prompts with a checkpoint",
        description="Answer prompts with a checkpoint, saved under any parallel layout. For a model that needs "
        "several processes: torchrun --nproc-per-node N --no-python nemo-kto generate --tensor-parallel N ...",
    )
    generate.add_argument("checkpoint", type=Path, help="checkpoint folder: <log dir>/checkpoints/<name>")
    generate.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to answer")
    generate.add_argument("--file", type=Path, help="file with prompts: rows with a field prompt, text or messages")
    generate.add_argument(
        "--raw", action="store_true", help="take texts as they are, also if the tokenizer has a chat template"
    )
    generate.add_argument("--max-new-tokens", type=_positive, default=256, metavar="TOKENS", help="longest answer")
    generate.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0, the default: the most probable token each time"
    )
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw of the likeliest tokens only")
    generate.add_argument("--seed", type=int, default=0, help="of the draws")
    generate.add_argument("--tensor-parallel", type=_positive, default=1, metavar="N", help="processes sharing layers")
    generate.add_argument("--pipeline-parallel", type=_positive, default=1, metavar="N", help="pipeline stages")
    generate.add_argument("--json", action="store_true", help="print JSON Lines")
    generate.set_defaults(run=_command("generate"))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def _add_data_commands(commands: Any) -> None:
    data = commands.add_parser("data", help="check, convert or look at feedback")
    actions = data.add_subparsers(required=True, metavar="ACTION")

    check = actions.add_parser(
        "check",
        help="say what is in the data, and what is wrong with it",
        description="Read feedback as training would, and print what is in it. The exit code is 1 if a record cannot "
        "be used. Options have the defaults of the keys of model.data; docs/data.md explains them.",
    )
    _add_reading(check)
    _add_tokenization(check)
    check.add_argument("--seq-length", type=int, metavar="TOKENS", help="longest prompt + response")
    check.add_argument("--overlong", metavar="WHAT", help="drop, truncate_prompt_left or truncate_response")
    check.add_argument(
        "--global-batch-size", type=int, metavar="SAMPLES", help="samples per step; default: what is recommended"
    )
    check.add_argument("--seed", type=int, help="model.seed, for the order of the samples")
    check.add_argument("--cache-dir", metavar="FOLDER", help="keep the tokens here, as model.data.cache_dir does")
    check.add_argument("--json", action="store_true", help="print JSON")
    check.set_defaults(run=_command("data", "check"))

    convert = actions.add_parser(
        "convert",
        help="write feedback of any format as JSON Lines",
        description="Write feedback as JSON Lines with prompt, completion and label, which TRL reads as well.",
    )
    _add_reading(convert)
    convert.add_argument("--output", "-o", type=Path, required=True, help="file to create")
    convert.add_argument("--on-bad-record", metavar="WHAT", help="error or skip")
    convert.add_argument(
        "--prompt-template", choices=["chat"], help="chat: make messages of strings; a file holds one kind only"
    )
    convert.set_defaults(run=_command("data", "convert"))

    show = actions.add_parser(
        "show",
        help="print a record as the model will see it",
        description="Print prompt and response of a record as the model will see them, special tokens included.",
    )
    show.add_argument("number", type=int, metavar="N", help="number of the record, from 1")
    _add_reading(show)
    _add_tokenization(show)
    show.set_defaults(run=_command("data", "show"))


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="file, folder, pattern or data set with feedback")
    parser.add_argument("--format", metavar="NAME", help="format of the files; default: told by the columns")
    parser.add_argument(
        "--field",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="column, or path, that holds prompt, response, label ...; may be repeated",
    )
    parser.add_argument("--reader", metavar="PATH", help="dotted path of a function that reads the files")
    parser.add_argument("--desirable-if", metavar="COMPARISON", help="labels are ratings: '>= 4'")
    parser.add_argument(
        "--labels",
        action="append",
        default=[],
        metavar="KIND=WORDS",
        help="what labels of your own mean: desirable=good,like or undesirable=bad; may be repeated",
    )
    parser.add_argument("--json-strings", metavar="WHAT", help="auto, messages or text: strings that spell messages")


def _add_tokenization(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer", type=Path, required=True, metavar="FOLDER", help="Hugging Face folder of model or tokenizer"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="let code in that folder run")
    parser.add_argument("--prompt-template", metavar="TEXT", help="for strings: text with {prompt} in it, or chat")
    parser.add_argument("--special-tokens", metavar="WHAT", help="auto, text or control")
    parser.add_argument("--system", metavar="WHAT", help="keep, merge_into_user or drop")
    parser.add_argument("--template-losses", metavar="WHAT", help="error or warn")
    parser.add_argument("--no-append-eod", action="store_true", help="end no response with the EOS token")


def _cache_reference(options: argparse.Namespace) -> None:
    run_script("cache_reference", [*options.overrides, "model.kto.reference.mode=cached"])


def run_script(command: str, overrides: Sequence[str]) -> None:
    """Run a command that takes a configuration, once that has been judged; exit as `stopping.py` says when stopped.

    Args:
        command: Name of a module of `nemo_kto.commands` and of its function.
        overrides: `KEY=VALUE` of the command line.
    """
    stopping.take_signals()
    run_guarded(lambda: _run_script(command, overrides))


def _run_script(command: str, overrides: Sequence[str]) -> None:
    silence_startup_noise()
    from nemo_kto.config.compose import run_configured  # Hydra only where it is needed: --help stays instant

    def run(config: KTOConfig) -> None:
        from nemo_kto.runs.early import check_early

        silence_startup_noise()  # of a --multirun this may be another process, which began here
        stopping.take_signals()  # or the next one in this process
        check_early(config, command)
        if _imported(command, command)(config) is False:
            sys.exit(stopping.STOPPED_EARLY)

    run_configured(run, overrides, around=_told_to_others)


def _told_to_others(raw: DictConfig) -> AbstractContextManager[None]:
    """Return what tells the other ranks of a failure in it, with a configuration that has not been judged."""
    from omegaconf import OmegaConf

    from nemo_kto.runtime.early_end import told_to_others

    def asked_for() -> tuple[int | str, int | str]:
        devices, nodes = (OmegaConf.select(raw, f"trainer.{key}") for key in ("devices", "num_nodes"))
        return devices, nodes

    return told_to_others(asked_for)


def _command(module: str, action: str = "run") -> Callable[[argparse.Namespace], None]:
    """Return a function that imports a module of `nemo_kto.commands` and calls its `action` with the options."""

    def run(options: argparse.Namespace) -> None:
        silence_startup_noise()
        _imported(module, action)(options)

    return run


def _imported(module: str, action: str) -> Callable[[Any], None]:
    """Return a function of a module of `nemo_kto.commands`."""
    with without_wandb():
        loaded = importlib.import_module(f"nemo_kto.commands.{module}")
    silence_loaded_packages()
    function: Callable[[Any], None] = getattr(loaded, action)
    return function


if __name__ == "__main__":
    main()
