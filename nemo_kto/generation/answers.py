"""Answers of policy and reference to the same few prompts, again and again while a model is trained."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedTokenizerBase

from nemo_kto.generation.decoding import Sampling, generate
from nemo_kto.generation.rows import Prompt
from nemo_kto.kto.megatron_gpt_kto_model import MegatronGPTKTOModel
from nemo_kto.kto.reference import ExchangedReference, LiveReference
from nemo_kto.runtime import parallel
from nemo_kto.runtime.disk import reason_of

logger = logging.getLogger(__name__)


class AnswerPrompts(Callback):
    """Answers some prompts after validations and at the end, and writes down what policy and reference say.

    One line for each prompt goes to a JSON Lines file, `{"step", "prompt", "policy", "reference"}`, where `step` is
    the number of steps taken, with small `images` where the prompt shows some; TensorBoard gets the texts. The
    reference answers once, unless it moves.

    Args:
        prompts: What is answered; at least one.
        tokenizer: Makes text of tokens.
        sampling: How answers are made; the same draws each time.
        stop_token_ids: Tokens that end an answer.
        every: Validations between two times; the last one always counts.
        file: The JSON Lines file; lines are appended.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        stop_token_ids: frozenset[int],
        every: int,
        file: Path,
    ) -> None:
        self._prompts = list(prompts)
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._stop_token_ids = stop_token_ids
        self._every = every
        self._file = file
        self._reference_answers: list[str] | None = None
        self._answered_at = -1
        self._failed = False

    def answer_as_reference(self, model: MegatronGPTKTOModel) -> None:
        """Keep the answers of the model as it is for those of a reference that is not there later; collective."""
        self._reference_answers = self._answers(model)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer, when it is time."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        interval = trainer.fit_loop.epoch_loop.val_interval  # type: ignore[attr-defined]
        if trainer.global_step % (interval * self._every) == 0:
            self._answer(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer at the end of the run, unless it was stopped before."""
        if trainer.global_step == trainer.max_steps != self._answered_at:
            self._answer(trainer, pl_module)

    def _answer(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, MegatronGPTKTOModel)
        self._answered_at = trainer.global_step
        trainer.strategy.complete_parameters()  # type: ignore[attr-defined]
        policy = self._answers(pl_module)
        reference = self._answers_of_reference(pl_module)
        prompts = [self._tokenizer.decode(prompt.in_brief) for prompt in self._prompts]
        rows = list(zip(prompts, policy, reference, strict=True))
        parallel.run_on_rank_zero(partial(self._write, trainer, rows), f"{self._file} cannot be written")

    def _answers_of_reference(self, model: MegatronGPTKTOModel) -> list[str]:
        if self._reference_answers is not None:
            return self._reference_answers
        reference = model.reference
        assert isinstance(reference, LiveReference), "a cached one has answered before"
        with reference.activated():
            answers = self._answers(model)
        if not (isinstance(reference, ExchangedReference) and model.reference_settings.sync_every):
            self._reference_answers = answers
        return answers

    def _answers(self, model: MegatronGPTKTOModel) -> list[str]:
        """Return the text of the live model's answers, on every rank."""
        answers = generate(
            list(model.chunks),
            self._prompts,
            self._sampling,
            stop_token_ids=self._stop_token_ids,
            layout=model.layout,
            place=parallel.position(),
        )
        return [self._tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]

    def _write(self, trainer: Trainer, rows: list[tuple[str, str, str]]) -> None:
        names = ("prompt", "policy", "reference")
        try:
            self._append(trainer, names, rows)
        except OSError as error:  # what the answers show can be looked at later, the run cannot be done again
            if not self._failed:
                reason = reason_of(error, self._file)
                logger.warning("%s cannot be written: %s. Training goes on without it.", self._file, reason)
            self._failed = True

    def _append(self, trainer: Trainer, names: tuple[str, str, str], rows: list[tuple[str, str, str]]) -> None:
        with self._file.open("a", encoding="utf-8") as lines:
            for prompt, row in zip(self._prompts, rows, strict=True):
                values = {"step": trainer.global_step, **dict(zip(names, row, strict=True))}
                if prompt.thumbnails:
                    values["images"] = prompt.thumbnails
                lines.write(json.dumps(values, ensure_ascii=False) + "\n")
        for sink in trainer.loggers:
            if isinstance(sink, TensorBoardLogger):
                table = [names, ("---",) * 3, *(tuple(map(_as_cell, row)) for row in rows)]
                text = "\n".join("| " + " | ".join(cells) + " |" for cells in table)
                sink.experiment.add_text("generations", text, trainer.global_step)


_MARKUP = {ord(mark): f"&#{ord(mark)};" for mark in "\\`*_[]|~#<>&"} | {ord("\n"): "<br>"}


def _as_cell(text: str) -> str:
    """Return text that Markdown shows as it is, in one cell of a table."""
    return text.translate(_MARKUP)
