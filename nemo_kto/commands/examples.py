"""What each command's --help shows beside its arguments: how it is called. Imports nothing but argparse."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

EXAMPLES: dict[str, tuple[str, ...]] = {
    "train": (
        "nemo-kto train pretrained_checkpoint.restore_from_path=Llama-3.2-1B "
        "model.data.data_prefix.train=feedback.jsonl",
        "nemo-kto train ... trainer.devices=8 model.tensor_model_parallel_size=2 trainer.precision=bf16-mixed",
        "nemo-kto train ... --multirun model.optim.lr=1e-6,5e-6",
        "nemo-kto train recipe=llama3_8b_lora pretrained_checkpoint.restore_from_path=Llama-3.1-8B ...",
    ),
    "evaluate": (
        "nemo-kto evaluate exp_manager.explicit_log_dir=results/my_run <the other keys of that run>",
        "nemo-kto evaluate ... evaluation.checkpoint=results/my_run/checkpoints/<name> evaluation.output=scores.json",
    ),
    "export-hf": (
        "nemo-kto export-hf results/my_run/checkpoints/<name> aligned",
        "nemo-kto export-hf results/my_run/checkpoints/<name> merged --merge --dtype bfloat16",
        "nemo-kto export-hf results/my_run/checkpoints/<name> aligned --push-to-hub me/my-model",
    ),
    "cache-reference": ("nemo-kto cache-reference <the keys of the run> trainer.devices=8",),
    "generate": (
        'nemo-kto generate results/my_run/checkpoints/<name> "What is the capital of Norway?"',
        "nemo-kto generate results/my_run/checkpoints/<name> --file prompts.jsonl --temperature 0.7 --json",
        "torchrun --nproc-per-node 4 --no-python nemo-kto generate results/my_run/checkpoints/<name> Hello "
        "--tensor-parallel 4",
    ),
    "report": (
        "nemo-kto report results/my_run",
        "nemo-kto report results/a results/b -o comparison",
    ),
    "plan": (
        "nemo-kto plan --model Llama-3.1-70B --gpus 64 --seq-length 4096",
        "nemo-kto plan --model config.json --gpus 8 --gpu h200 --lora 'model.peft.lora_tuning.target_modules=[all]'",
        "nemo-kto plan --model Llama-3.1-8B --gpus 8 --layout tp=2,mbs=2,recompute=full --reference cached",
        "nemo-kto plan --model Llama-3.1-8B recipe=llama3_8b",
    ),
    "recipes": (
        "nemo-kto recipes",
        "nemo-kto recipes llama3_8b_lora",
    ),
    "data check": (
        "nemo-kto data check feedback.jsonl --tokenizer Llama-3.2-1B --seq-length 2048",
        "nemo-kto data check ratings.csv --tokenizer Llama-3.2-1B --field label=score --desirable-if '>= 4' --json",
    ),
    "data convert": ("nemo-kto data convert export.json --output feedback.jsonl --on-bad-record skip",),
    "data show": ("nemo-kto data show 17 feedback.jsonl --tokenizer Llama-3.2-1B --prompt-template chat",),
    "checkpoint list": ("nemo-kto checkpoint list results/my_run",),
    "checkpoint verify": ("nemo-kto checkpoint verify results/my_run --json",),
    "doctor": (
        "nemo-kto doctor",
        "nemo-kto doctor <the keys of the run> --json",
    ),
    "config": (
        "nemo-kto config model.optim.lr",
        "nemo-kto config model.kto",
        "nemo-kto config --json",
    ),
    "completion": (
        'eval "$(nemo-kto completion bash)"                                 # for this shell; in ~/.bashrc for all',
        'nemo-kto completion zsh > "${fpath[1]}/_nemo-kto"                  # where compinit looks',
    ),
}
"""Command -> command lines."""

_HEADING = "examples:\n"


class ExamplesFormatter(argparse.HelpFormatter):
    """Leaves the lines of examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(_HEADING) else super()._fill_text(text, width, indent)


def add_examples(parser: argparse.ArgumentParser) -> None:
    """Give every command its examples."""
    for name, command in commands_of(parser):
        command.formatter_class = ExamplesFormatter
        command.epilog = _HEADING + "\n".join(f"  {line}" for line in EXAMPLES[name])


def commands_of(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield the name and the parser of each command that has no commands of its own."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in below:
        for word, command in action.choices.items():
            yield from commands_of(command, f"{name} {word}".strip())
    if not below:
        yield name, parser
