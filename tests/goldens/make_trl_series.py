"""Trains a tiny Llama with TRL's KTOTrainer and keeps what each step computed, for integration/test_trl_series.py.

It runs in a virtual environment of its own, without nemo_kto:

    python3.11 -m venv /tmp/trl && /tmp/trl/bin/pip install 'torch==2.13.0' 'trl==1.16.0'
    OMP_NUM_THREADS=1 /tmp/trl/bin/python tests/goldens/make_trl_series.py

`model/` and `feedback.jsonl` are made only where they are missing: torch's random numbers differ between versions, so
both sides read the same files. `trl_series.json` is written anew:

* `versions`; `settings`, everything the training depends on;
* `tokens`: TRL's ids of each record, and the completions of its KL set for each micro-batch size;
* `runs`, by name: `loss_type`, `micro_batch_size`, `global_batch_size`, `desirable_weight` and `steps`. Of each step
  * `loss`, the mean over the samples of the global batch, and `grad_norm`, before clipping;
  * `kl`, one number for each micro-batch (empty without a KL set);
  * `rewards`, beta times the log-ratio of each sample, in the order of the data;
  * `logged`, what TRL logged, as far as it is a mean over the samples: under accumulation it logs means of the
    micro-batches' means, in which samples count unequally. Of a class without samples it logs nothing.
"""

from __future__ import annotations

import itertools
import json
import platform
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import KTOConfig, KTOTrainer

FOLDER = Path(__file__).parent
MODEL, FEEDBACK, SERIES = FOLDER / "model", FOLDER / "feedback.jsonl", FOLDER / "trl_series.json"
WORDS = "red green blue sea sky tree house dog cat sun moon star rain snow wind fire stone river road hill".split()
NUM_RECORDS = 40
SETTINGS = {
    "steps": 20,
    "beta": 0.2,
    "undesirable_weight": 1.0,
    "learning_rate": 1e-3,
    "betas": [0.9, 0.98],
    "eps": 1e-8,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
}
CASE_FIELDS = ("loss_type", "micro_batch_size", "global_batch_size", "desirable_weight")
CASES: list[tuple[str, int, int, float]] = [
    *itertools.product(("kto", "apo_zero_unpaired"), (8, 2), (8,), (1.0, 1.33)),
    ("kto", 4, 4, 1.33),  # a step of the first four records has no undesirable sample
    ("kto", 2, 2, 1.33),  # most steps lack a class
]
MEANS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
"""What TRL logs as means over the samples of a micro-batch."""


def make_model(folder: Path) -> None:
    """Save a Llama of 32,416 float32 weights and its tokenizer, which has one token a word."""
    vocabulary = {word: index for index, word in enumerate(["<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,  # far from uniform predictions, so that numbers differ between samples
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_feedback(file: Path) -> None:
    """Write records whose prompts all differ, so that no pairing rule has reason to avoid a neighbour."""
    generator = random.Random(7)
    prompts: set[str] = set()
    while len(prompts) < NUM_RECORDS:
        prompts.add(" ".join(generator.choices(WORDS, k=generator.randint(2, 6))))
    with file.open("w") as stream:
        for prompt in sorted(prompts):
            completion = " " + " ".join(generator.choices(WORDS, k=generator.randint(1, 9)))
            label = generator.random() < 0.5
            stream.write(json.dumps({"prompt": prompt, "completion": completion, "label": label}) + "\n")


class RecordingTrainer(KTOTrainer):
    """TRL's trainer; besides, it keeps what TRL does not log: each sample's reward, each micro-batch's loss and kl.

    Attributes:
        steps: What is kept of each optimizer step; see the module.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.steps: list[dict[str, Any]] = []
        self._micro_batches: list[dict[str, Any]] = []
        self._num_seen = 0
        self._log_probs: dict[str, torch.Tensor] = {}
        for name, model in (("policy", self.model), ("reference", self.ref_model)):
            model.register_forward_hook(lambda module, inputs, output, name=name: self._keep(name, output))

    def _keep(self, name: str, output: Any) -> None:
        self._log_probs[name] = output.log_probs.detach().sum(-1)

    def compute_loss(self, model: Any, inputs: Mapping[str, torch.Tensor], *arguments: Any, **keywords: Any) -> Any:
        """Return TRL's loss of one micro-batch."""
        loss = super().compute_loss(model, inputs, *arguments, **keywords)
        # each model's last call scores the samples, the one before it their KL set
        rewards = self.args.beta * (self._log_probs["policy"] - self._log_probs["reference"])
        self._check(inputs, rewards)
        kl = [self._metrics["train"]["kl"][-1]] if self.calculate_KL else []
        self._micro_batches.append({"loss": loss.item(), "kl": kl, "rewards": rewards.tolist()})
        return loss

    def _check(self, inputs: Mapping[str, torch.Tensor], rewards: torch.Tensor) -> None:
        """Assert that the samples come in the order of the data, and that their rewards are those that TRL logs."""
        desirable = inputs["label"].bool()
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
            assert ids[mask].tolist() == self.ids_of(self._num_seen % len(self.train_dataset)), self._num_seen
            self._num_seen += 1
        for name, members in (("chosen", desirable), ("rejected", ~desirable)):
            if members.any():
                logged = self._metrics["train"][f"rewards/{name}"][-1]
                assert abs(rewards[members].mean().item() - logged) < 1e-6, (name, rewards, logged)

    def ids_of(self, index: int) -> list[int]:
        """Return the tokens of a record, prompt and completion."""
        record = self.train_dataset[index]
        return list(record["prompt_ids"] + record["completion_ids"])

    def log(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
        """Log as TRL does, and put a step's micro-batches together."""
        super().log(logs, *arguments, **keywords)
        if "grad_norm" not in logs:  # the summary at the end
            return
        parts, self._micro_batches = self._micro_batches, []
        assert len(parts) == self.args.gradient_accumulation_steps
        self.steps.append(
            {
                "loss": sum(part["loss"] for part in parts) / len(parts),
                "grad_norm": logs["grad_norm"],
                "kl": [value for part in parts for value in part["kl"]],
                "rewards": [value for part in parts for value in part["rewards"]],
                "logged": {name: logs[name] for name in MEANS if name in logs} if len(parts) == 1 else {},
            }
        )


def arguments_of(case: dict[str, Any], output: str, settings: dict[str, Any]) -> KTOConfig:
    """Return what TRL is told of a case."""
    return KTOConfig(
        output_dir=output,
        loss_type=case["loss_type"],
        beta=settings["beta"],
        desirable_weight=case["desirable_weight"],
        undesirable_weight=settings["undesirable_weight"],
        per_device_train_batch_size=case["micro_batch_size"],
        gradient_accumulation_steps=case["global_batch_size"] // case["micro_batch_size"],
        max_steps=settings["steps"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant",
        optim="adamw_torch",
        adam_beta1=settings["betas"][0],
        adam_beta2=settings["betas"][1],
        adam_epsilon=settings["eps"],
        weight_decay=settings["weight_decay"],
        max_grad_norm=settings["max_grad_norm"],
        train_sampling_strategy="sequential",
        model_init_kwargs={"dtype": "float32"},
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def train(case: dict[str, Any], output: str) -> RecordingTrainer:
    """Return a trainer that has taken all steps; `case` is one of `CASES`."""
    arguments = arguments_of(case, output, SETTINGS)
    records = [json.loads(line) for line in FEEDBACK.read_text().splitlines()]
    trainer = RecordingTrainer(model=str(MODEL), args=arguments, train_dataset=Dataset.from_list(records))
    trainer.train()
    assert len(trainer.steps) == SETTINGS["steps"]
    return trainer


def tokens_of(trainers: list[RecordingTrainer]) -> dict[str, Any]:
    """Return the ids of all records, which no setting changes, and of the completions of each KL set."""
    fields = ("prompt_ids", "completion_ids", "label")
    samples = [[list(trainer.train_dataset[name]) for name in fields] for trainer in trainers]
    assert all(columns == samples[0] for columns in samples)
    tokens: dict[str, Any] = dict(zip(fields, samples[0], strict=True))
    tokens["kl_completion_ids"] = {
        str(trainer.args.per_device_train_batch_size): list(trainer.train_dataset["KL_completion_ids"])
        for trainer in trainers
        if trainer.calculate_KL
    }
    return tokens


def main() -> None:
    """Write the series of all runs."""
    torch.set_num_threads(1)
    if not MODEL.exists():
        make_model(MODEL)
    if not FEEDBACK.exists():
        make_feedback(FEEDBACK)
    trainers, runs = [], []
    for values in CASES:
        case = dict(zip(CASE_FIELDS, values, strict=True))
        with tempfile.TemporaryDirectory() as output:
            trainer = train(case, output)
        name = "{loss_type}-{micro_batch_size}of{global_batch_size}-{desirable_weight}".format(**case)
        runs.append((name, {**case, "steps": trainer.steps}))
        trainers.append(trainer)
    write_series(SERIES, SETTINGS, tokens_of(trainers), dict(runs))


def write_series(file: Path, settings: dict[str, Any], tokens: dict[str, Any], runs: dict[str, Any]) -> None:
    """Write what was kept of all runs, one in a line."""
    versions = {package.__name__: package.__version__ for package in (trl, transformers, torch)}
    head = {"versions": {**versions, "python": platform.python_version()}, "settings": settings, "tokens": tokens}
    parts = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    lines = [f"{json.dumps(name)}: {json.dumps(run)}" for name, run in runs.items()]
    parts.append('"runs": {\n' + ",\n".join(lines) + "\n}")
    file.write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    main()
