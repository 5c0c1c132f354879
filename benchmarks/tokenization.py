"""What it costs to make tokens of conversations, beside the bare libraries and beside TRL's preparation.

python benchmarks/tokenization.py [FILE.jsonl] [--records N] [--rounds N] [--tokenizer FOLDER] [--trl-python PYTHON]

FILE holds rows with messages in `prompt` and `completion`, and a `label`; without one, conversations of words from
this project's pages are made, with lengths as people's have them: log-normal, about 310 tokens on average with the
quickstart's tokenizer, a quarter of them of several turns.

The sides, each in a new process that does it once and counts its own CPU time, one thread, after a first small round:

    bare     transformers and its `tokenizers`: JSON lines, `apply_chat_template` of each conversation, ids of all of
             them in calls of 256. This is the least that anybody has to do, and says nothing of where an answer begins
    twice    the same, and of each prompt as well, as it takes to tell the two apart
    ours     `TokenCache`: everything from the file to a store on disk, with all checks
    TRL      KTOTrainer's preparation of the same rows, which are in memory already, up to its columns of ids

They take turns, so that what else the machine does disturbs all alike; a ratio is of one round, and the table has the
median of all rounds and the range. TRL runs in an environment of its own (`.venv-trl`, see against_trl.py), with the
version of transformers that it wants; `--without-trl` leaves it out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from against_trl import BenchmarkError, trl_python
from common import median_and_range, publish

REPOSITORY = Path(__file__).resolve().parent.parent
TOKENIZER = REPOSITORY / "examples" / "nlp" / "kto" / "quickstart" / "model"
SIDES = ("bare", "twice", "ours", "TRL")
CALL = 256
"""Conversations in a call of the tokenizer; as many as ours has."""
WARM = 64
"""Records of the round that is not counted."""


def main() -> None:
    """Let the sides take turns and publish what they took; or be one of them."""
    options = parse_options()
    if options.side is not None:
        print(json.dumps(SIDE_OF[options.side](options.file, options.tokenizer)))
        return
    try:
        pythons = dict.fromkeys(SIDES[:3], Path(sys.executable))
        if not options.without_trl:
            pythons["TRL"] = options.trl_python or trl_python(REPOSITORY / ".venv-trl")
        with tempfile.TemporaryDirectory() as folder:
            file = options.file or Path(folder) / "conversations.jsonl"
            if options.file is None:
                write_conversations(file, options.records)
            found: dict[str, list[dict[str, Any]]] = {side: [] for side in pythons}
            for number in range(options.rounds):
                for side, python in pythons.items():
                    found[side].append(measured(side, python, file, options.tokenizer))
                check_tokens({side: runs[-1] for side, runs in found.items()})
                seconds = {side: f"{runs[-1]['seconds']:.2f} s" for side, runs in found.items()}
                print(f"round {number + 1} of {options.rounds}: {seconds}", flush=True)
    except BenchmarkError as error:
        sys.exit(f"error: {error}")
    publish("tokenization", table(found), runs=found, file=options.file and options.file.name)


def parse_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", help="conversations; made if left out")
    parser.add_argument("--records", type=int, default=4600, help="how many are made")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="a Hugging Face folder")
    parser.add_argument("--trl-python", type=Path, help="Python of an environment that has TRL already")
    parser.add_argument("--without-trl", action="store_true", help="leave TRL out")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_conversations(file: Path, number: int) -> None:
    """Write conversations of words from the project's pages; the same ones for the same number."""
    generator = random.Random(0)
    pages = sorted((REPOSITORY / "docs").glob("*.md"))
    found = " ".join(page.read_text(encoding="utf-8") for page in pages).split(" ")
    words = [word for word in found if "<|" not in word]  # special tokens, which the sides do not take alike

    def text(median: float) -> str:
        start, length = generator.randrange(len(words) - 3000), generator.lognormvariate(0, 0.8) * median
        return " ".join(words[start : start + max(1, min(3000, round(length)))])

    with file.open("w", encoding="utf-8") as stream:
        for index in range(number):
            prompt = [{"role": "user", "content": text(15)}]
            for _ in range(generator.choice((0, 0, 0, 1, 2)) if index % 4 == 0 else 0):
                prompt += [{"role": "assistant", "content": text(33)}, {"role": "user", "content": text(12)}]
            row = {"prompt": prompt, "completion": [{"role": "assistant", "content": text(36)}]}
            stream.write(json.dumps(row | {"label": index % 2 == 0}) + "\n")


def measured(side: str, python: Path, file: Path, tokenizer: Path) -> dict[str, Any]:
    """Return what a new process of one side says."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    if side != "TRL":
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    else:
        environment.pop("PYTHONPATH", None)
    command = [python, __file__, file, "--side", side, "--tokenizer", tokenizer]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"The process of {side!r} failed:\n{done.stderr[-3000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def check_tokens(runs: dict[str, dict[str, Any]]) -> None:
    """Raise an error unless all sides made as many tokens, but for those of conversations that spell special ones."""
    tokens = {side: run["tokens"] for side, run in runs.items()}
    if max(tokens.values()) > 1.001 * min(tokens.values()):
        raise BenchmarkError(f"The numbers of tokens differ: {tokens}.")


def table(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, str]]:
    """Return the rows of the table."""
    rows = []
    for side, runs in found.items():
        ratios = {
            f"/ {other}": median_and_range(
                [one["seconds"] / two["seconds"] for one, two in zip(runs, others, strict=True)]
            )
            for other, others in found.items()
            if other != "ours"
        }
        seconds = statistics.median(run["seconds"] for run in runs)
        rows.append(
            {
                "side": side,
                "CPU s": f"{seconds:.2f}",
                "records/s": f"{runs[0]['records'] / seconds:.0f}",
                "tokens": f"{runs[0]['tokens']:,}",
                **ratios,
            }
        )
    return rows


def timed(run: Callable[[list[str]], int], file: Path) -> dict[str, Any]:
    """Return the CPU time of a side: `run` takes lines of JSON and returns the number of tokens."""
    lines = file.read_text(encoding="utf-8").splitlines()
    run(lines[:WARM])
    started = time.process_time()
    tokens = run(lines)
    return {"seconds": time.process_time() - started, "records": len(lines), "tokens": tokens}


def bare(file: Path, folder: Path, *, prompts: bool = False) -> dict[str, Any]:
    """Measure transformers alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(messages: list[Any], **options: bool) -> int:
        texts = [tokenizer.apply_chat_template(of, tokenize=False, **options) for of in messages]
        found = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return sum(map(len, found))

    def run(lines: list[str]) -> int:
        tokens = 0
        for start in range(0, len(lines), CALL):
            rows = [json.loads(line) for line in lines[start : start + CALL]]
            tokens += ids([row["prompt"] + row["completion"] for row in rows])
            if prompts:
                ids([row["prompt"] for row in rows], add_generation_prompt=True)
        return tokens

    return timed(run, file)


def ours(file: Path, folder: Path) -> dict[str, Any]:
    """Measure what this package does."""
    from nemo_kto.data.reading.sources import Source
    from nemo_kto.data.tokens.cache import TokenCache
    from nemo_kto.data.tokens.rendering import TokenizationSettings
    from nemo_kto.data.tokens.tokenization import Encoder
    from nemo_kto.data.tokens.tokenizer import load_tokenizer

    encoder = Encoder(load_tokenizer(folder), TokenizationSettings())
    with tempfile.TemporaryDirectory() as name:

        def run(lines: list[str]) -> int:
            data = Path(name) / f"{len(lines)}.jsonl"
            store = TokenCache(Path(name) / "tokens", encoder, workers=1).tokens_of(Source(str(data)), skip_bad=False)
            return len(store.tokens)

        lines = file.read_text(encoding="utf-8").splitlines()
        for some in (lines[:WARM], lines):
            (Path(name) / f"{len(some)}.jsonl").write_text("".join(f"{line}\n" for line in some), encoding="utf-8")
        return timed(run, file)


def trl(file: Path, folder: Path) -> dict[str, Any]:
    """Measure TRL's preparation, of a trainer that holds a model but does not use it."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    seconds: list[float] = []
    original = KTOTrainer._prepare_dataset

    def observed(*args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        prepared = original(*args, **kwargs)
        seconds.append(time.process_time() - started)
        return prepared

    KTOTrainer._prepare_dataset = observed

    def run(lines: list[str]) -> int:
        with tempfile.TemporaryDirectory() as output:
            arguments = KTOConfig(
                output_dir=output, max_length=None, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True
            )
            dataset = Dataset.from_list([json.loads(line) for line in lines])
            trainer = KTOTrainer(model=str(folder), args=arguments, train_dataset=dataset)
            columns = trainer.train_dataset["prompt_ids"], trainer.train_dataset["completion_ids"]
            return sum(len(ids) for column in columns for ids in column)

    return timed(run, file) | {"seconds": seconds[-1]}


SIDE_OF: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "bare": bare,
    "twice": lambda file, folder: bare(file, folder, prompts=True),
    "ours": ours,
    "TRL": trl,
}


if __name__ == "__main__":
    main()
