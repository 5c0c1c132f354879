"""Every command on a page is one that there is, with keys and options that there are; whole pages of them are run.

What is in a block marked `bash` is a command of this project. Each is judged in a moment: keys are composed by Hydra
and checked as a run's are, arguments are parsed, files and targets have to be there. `RUN` names the pages whose
commands are then run, one after the other in one shell, in a folder with a small model, small data and the
examples; what cannot be run there is in `NOT_RUN`, with the reason.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from nemo_kto import cli
from nemo_kto.config.compose import load_config
from tests.docs_samples.pages import PAGES, ROOT, Block, Command, blocks, commands
from tests.waiting import HANG

KEYS = "pretrained_checkpoint.restore_from_path=model model.data.data_prefix.train=train.jsonl"
STAND_INS = {
    "<Hugging Face folder>": "model",
    "<the keys of the training command>": f"{KEYS} model.data.data_prefix.validation=validation.jsonl "
    "trainer.devices=4 model.tensor_model_parallel_size=2 model.pipeline_model_parallel_size=2 "
    "exp_manager.explicit_log_dir=results/my_run",
    "<log dir>": "results/my_run",
    "<aligned>": "results/mine/hf",
    "<base>": "model",
    "<adapter>": "results/adapter/hf",
}
"""What stands for something of the reader's -> what is there when commands are run."""

NOT_RUN = {
    "make": "makes an environment; .ci/run and other tests do what the targets do",
    "pip": "changes the environment that the tests run in",
    "source": "the shell of the tests has the commands already",
    "eval": "changes the shell that it is typed in",
    "export": "begins what takes hours: tests",
    "nsys": "needs Nsight Systems and a GPU",
    "docker": "needs a daemon; tests/container/ runs the Dockerfile's commands",
    "enroot": "needs enroot and an image",
    "sbatch": "needs Slurm; tests/cluster/ has one",
    "srun": "needs Slurm",
    "salloc": "needs Slurm",
    "bash": "needs Slurm: srun.sh",
    "apt-get": "changes the machine",
    "wandb": "needs a server",
    "torchrun": "is run by tests/commands and tests/cluster; on two nodes it needs two",
    "benchmarks/gpu_first_hour.sh": "takes an hour; tests/examples/test_gpu_first_hour.py runs a small one",
}
"""Program -> why a page's block with it is not run."""

SCRIPTS_NOT_RUN = ("tests/", "-m")
"""What Python is not started with here: the tests' own scripts, which take hours, and pytest."""

CONFIGURED = ("train_gpt_kto.py", "eval_gpt_kto.py")
SHELL_ONLY = ("source", "export", "apt-get", "wandb", "enroot", "srun", "salloc")
"""Programs of others, of whose arguments nothing here is known."""


SMALL = (
    "trainer.accelerator=cpu trainer.kto.max_steps=2 trainer.kto.limit_val_batches=1 trainer.kto.val_check_interval=2 "
    "model.global_batch_size=8 model.data.tokenize_workers=1"
)
"""What a run is made small with; the pages' own values come before and do not count."""

QUICKSTART = ROOT / "examples" / "nlp" / "kto" / "quickstart"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that looks like a clone, with a model and data, whose commands make runs small."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "model").symlink_to(QUICKSTART / "model")
    lines = (QUICKSTART / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name in ("train", "validation", "held_out", "other"):
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[:64]), encoding="utf-8")
    prompts = (QUICKSTART / "data" / "prompts.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "prompts.jsonl").write_text("".join(prompts[:2]), encoding="utf-8")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    shims = {
        "python": f'case "$1" in *{"|*".join(CONFIGURED)}) exec {sys.executable} "$@" {SMALL} ;; esac\n'
        f'exec {sys.executable} "$@"',
        "nemo-kto": f'case "$1" in doctor|cache-reference) set -- "$@" {SMALL} ;; esac\n'
        f"exec {sys.executable} -c 'from nemo_kto.cli import main; main()' \"$@\"",
    }
    for name, body in shims.items():
        shim = tmp_path / ".venv" / "bin" / name
        shim.write_text(f"#!/bin/bash\n{body}\n")
        shim.chmod(shim.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def with_stand_ins(script: str) -> str:
    """Return a script without what only a reader can know."""
    for placeholder, stand_in in STAND_INS.items():
        script = script.replace(placeholder, stand_in)
    return script


def check_keys(overrides: Sequence[str]) -> None:
    """Compose keys; raises ConfigError. With `-m`, of several values the first."""
    several = "-m" in overrides
    given = [override for override in overrides if override not in ("-m", "...")]
    load_config([re.sub(r",.*", "", override) if several else override for override in given])


def check_command(command: Command) -> None:
    """Fail unless the command is one that there is."""
    words = [word.removeprefix(".venv/bin/") for word in command.words]
    if not words:
        return
    program, arguments = words[0], words[1:]
    if program == "eval":
        words = arguments[0].removeprefix("$(").removesuffix(")").split()
    configured = next((number for number, word in enumerate(words) if word.endswith(CONFIGURED)), None)
    if configured is not None:
        assert (ROOT / words[configured].removeprefix("/opt/nemo_kto/")).is_file(), words[configured]
        check_keys(words[configured + 1 :])
    elif "nemo-kto" in words:
        options = cli._parser().parse_args(words[words.index("nemo-kto") + 1 :])
        implied = ["model.kto.reference.mode=cached"] if "cache-reference" in words else []
        check_keys([*getattr(options, "overrides", ()), *implied])
    elif re.match(r"[\w.]+=", program):  # keys that are added to a command further up
        lora = ["model.peft.peft_scheme=lora"] if "model.peft." in " ".join(words) else []
        check_keys([*KEYS.split(), *lora, *words])
    elif program == "make":
        assert f"\n{arguments[0]}:" in (ROOT / "Makefile").read_text()
    elif program == "sbatch":
        assert (ROOT / arguments[0]).is_file()
        check_keys(arguments[1:])
    elif program == "pip":
        check_requirement(arguments)
    elif program == "docker":
        assert (ROOT / "Dockerfile").is_file() and arguments[0] == "build"
    elif program == "python":
        check_script(arguments)
    else:
        assert program in SHELL_ONLY or (ROOT / program).is_file(), f"{program} is unknown here"


def check_requirement(arguments: list[str]) -> None:
    """Fail unless what pip shall install is this project, or one of its extras."""
    extra = re.fullmatch(r"nemo-kto\[(\w+)\]", arguments[-1])
    assert arguments[-1] == "." or extra is not None
    assert extra is None or f'"{extra[1]}": ' in (ROOT / "setup.py").read_text()
    assert "-c" not in arguments or (ROOT / arguments[arguments.index("-c") + 1]).is_file()


def check_script(arguments: list[str]) -> None:
    """Fail unless a Python script is there and knows its options."""
    if arguments[0] == "-m":
        assert arguments[1] == "pytest"
        assert not [word for word in arguments if word.startswith("tests/") and not (ROOT / word).exists()]
        return
    text = (ROOT / arguments[0]).read_text()
    for option in arguments[1:]:
        assert not re.match("--[a-z]", option) or f'"{option}"' in text, f"{arguments[0]} has no {option}"


def check_block(block: Block, arrays: dict[str, list[str]]) -> list[Command]:
    """Judge each command of a block and return them."""
    found = list(commands(with_stand_ins(block.text), arrays))
    for command in found:
        try:
            check_command(command)
        except (Exception, SystemExit) as error:
            pytest.fail(f"{block.page}:{block.line}: {' '.join(command.words)}: {error!r}")
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")])
def test_commands_and_keys_are_there(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("results/mine/hf", "results/adapter/hf", "my_adapter"):  # what commands before would have made
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(folder / "model")
    monkeypatch.chdir(folder)
    arrays = {"keys": KEYS.split()}
    assert [check_block(block, arrays) for block in blocks(page, "bash")]


@pytest.mark.parametrize(
    "wrong",
    [
        "python examples/nlp/kto/train_gpt_kto.py model.optim.lrr=1",
        "python examples/nlp/kto/train.py",
        "nemo-kto data chek a.jsonl",
        "nemo-kto doctor model.optim.lr=x",
        "model.kto.beta=0.1",
        "make tests",
        "pip install 'nemo-kto[more]'",
        "python tests/container/run.py --images nemo-26.06",
        "mpirun python",
    ],
)
def test_what_is_not_there_is_noticed(wrong: str) -> None:
    with pytest.raises(pytest.fail.Exception, match="page:1"):
        check_block(Block("page", 1, "bash", wrong), {})


FIRST = {
    "docs/evaluation.md": "python examples/nlp/kto/train_gpt_kto.py "
    f"{KEYS} model.peft.peft_scheme=lora exp_manager.explicit_log_dir=results/adapter",
    "docs/reliability.md": f"keys=({KEYS} exp_manager.explicit_log_dir=results/my_run)\n"
    'python examples/nlp/kto/train_gpt_kto.py "${keys[@]}"',
    "docs/report.md": f"python examples/nlp/kto/train_gpt_kto.py {KEYS} exp_manager.explicit_log_dir=results/my_run\n"
    "for name in a b c; do cp -r results/my_run results/$name; done",
}
"""Page -> what its readers have done before."""

RUN = (
    "README.md",
    "docs/cluster.md",
    "docs/coming_from/llama_factory.md",
    "docs/coming_from/ms_swift.md",
    "docs/coming_from/nemo_aligner.md",
    "docs/coming_from/trl.md",
    "docs/evaluation.md",
    "docs/get_started.md",
    "docs/images.md",
    "docs/lora.md",
    "docs/plan.md",
    "docs/reference.md",
    "docs/reliability.md",
    "docs/report.md",
)
"""Pages whose commands are run."""

PYTHON_PAGES = ("README.md", "docs/get_started.md", "docs/lora.md")
"""Those of them whose blocks of Python are run too, where they stand; docs/python.md has a test of its own."""


def is_run(block: Block) -> bool:
    """Whether a block's commands can be run here."""
    if block.language == "python":
        return block.page in PYTHON_PAGES
    found = [
        [word.removeprefix(".venv/bin/") for word in command.words] for command in commands(block.text, Anything())
    ]
    return all(
        words and words[0] not in NOT_RUN and not re.match(r"[\w.]+=", words[0]) and not is_tests_own(words)
        for words in found
    )


def is_tests_own(words: list[str]) -> bool:
    return words[0] == "python" and words[1].startswith(SCRIPTS_NOT_RUN)


class Anything(dict[str, list[str]]):
    """Arrays of which only the names matter."""

    def __missing__(self, name: str) -> list[str]:
        return []


def script_of(page: str, folder: Path, *, before: str) -> str:
    """Return a page's commands as one script; blocks of Python become files in the folder.

    Args:
        page: The page.
        folder: Where the script will run.
        before: The block with this, and what comes behind it, is left out; nothing is if it is empty.
    """
    lines = [
        "set -euo pipefail",
        'newest() { ls -d "$1"/checkpoints/*-last | tail -n 1; }',
        with_stand_ins(FIRST.get(page, "")),
    ]
    for block in filter(is_run, blocks(page, "bash", "python")):
        if before and before in block.text:
            break
        text = with_stand_ins(block.text)
        if block.language == "python":
            (folder / f"line_{block.line}.py").write_text(text, encoding="utf-8")
            text = f"python line_{block.line}.py"
        text = re.sub(r"(\S+)/checkpoints/<checkpoint>", r'"$(newest \1)"', text)
        text = text.replace("<checkpoint>", '"$(newest results/my_run)"')
        lines.append(re.sub(r"(?<=\s)\.\.\.(?=\s)", KEYS, text))
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("page", "before"),
    [("docs/get_started.md", "train_gpt_kto.py"), *(pytest.param(page, "", marks=pytest.mark.slow) for page in RUN)],
)
def test_a_pages_commands_run(page: str, before: str, folder: Path) -> None:
    script = script_of(page, folder, before=before)
    assert "nemo-kto" in script or "train_gpt_kto.py" in script
    path = f"{folder / '.venv' / 'bin'}:{os.environ['PATH']}"
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": path}
    done = subprocess.run(
        ["bash", "-xc", script], cwd=folder, env=variables, capture_output=True, text=True, timeout=HANG
    )
    assert done.returncode == 0, f"{done.stderr[-6000:]}\n{done.stdout[-2000:]}"


def test_every_page_with_a_command_that_can_be_run_is_run() -> None:
    # configuration.md shows how keys are written, with two files that are nowhere
    assert {page for page in PAGES if any(map(is_run, blocks(page, "bash")))} - {*RUN} == {"docs/configuration.md"}


def test_every_reason_is_needed() -> None:
    found = {
        command.words[0].removeprefix(".venv/bin/")
        for page in PAGES
        for block in blocks(page, "bash")
        for command in commands(block.text, Anything())
        if command.words
    }
    assert not {*NOT_RUN} - found
