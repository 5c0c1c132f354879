"""Trains a tiny LLaVA with TRL's KTOTrainer on texts with images, for integration/test_trl_series.py.

It runs where `make_trl_series.py` does, and needs Pillow besides, which transformers' image processors work with where
there is no torchvision:

    /tmp/trl/bin/pip install pillow
    OMP_NUM_THREADS=1 /tmp/trl/bin/python tests/goldens/make_trl_vision_series.py

In `vision/`, `model/`, `feedback.jsonl` and `images/` are made only where they are missing, and `trl_series.json` is
written anew. Its form is that of `make_trl_series.py`, but

* `tokens` has the KL completions of each number of records that TRL pairs, for all records of the data;
* a case besides has `trained`, which part: `all`, or `none` of the tower and the projector; and `blank`, whether all
  images are replaced by empty ones. The last tells what images mean to this model.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from make_trl_series import FOLDER, RecordingTrainer, arguments_of, write_series
from make_trl_series import SETTINGS as OF_TEXT
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

FOLDER = FOLDER / "vision"
MODEL, FEEDBACK, IMAGES, SERIES = (FOLDER / name for name in ("model", "feedback.jsonl", "images", "trl_series.json"))
WORDS = "red green blue circle square tree house dog cat left right above below what where is the a".split()
SPECIAL = ["<eos>", "<unk>", "<image>", "<user>", "<assistant>"]
NUM_RECORDS = 24
SIDE, PATCH = 16, 4
SIZES = [(16, 16), (24, 16), (16, 22), (9, 12), (40, 31), (16, 17), (8, 8), (33, 20)]
# the gradient of a key's bias is rounding alone, of which Adam with a tiny eps makes whole steps
SETTINGS = {**OF_TEXT, "steps": 10, "eps": 1e-6}
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ ' ' + part['text'] + ' ' }}{% endif %}"
    "{% endfor %}{{ '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
CASE_FIELDS = ("trained", "blank", "micro_batch_size", "global_batch_size")
CASES: list[tuple[str, bool, int, int]] = [
    ("all", False, 8, 8),
    ("none", False, 8, 8),
    ("all", False, 2, 8),  # some micro-batches have no image
    ("all", True, 8, 8),
]


def make_model(folder: Path) -> None:
    """Save a LLaVA of about 50,000 float32 weights and its processor: a CLIP tower, of whose last layer but one."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<user>", "<assistant>"],
    )
    torch.manual_seed(0)
    wide = {"initializer_range": 0.2}  # far from uniform predictions, so that numbers differ between samples
    text = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=0,
        **wide,
    )
    tower = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=8,
        initializer_factor=2.0,
        **wide,
    )
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=vocabulary["<image>"],
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **wide,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_convert_rgb=True
        ),
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


def make_images(folder: Path) -> None:
    """Write an image of each size: noise in cells of four pixels, one of them grey."""
    folder.mkdir(parents=True)
    generator = random.Random(3)
    for number, (width, height) in enumerate(SIZES):
        mode, channels = ("L", 1) if number == 3 else ("RGB", 3)
        cells = -(-width // 4), -(-height // 4)
        noise = bytes(generator.randrange(256) for _ in range(cells[0] * cells[1] * channels))
        image = Image.frombytes(mode, cells, noise)
        image.resize((width, height), Image.Resampling.NEAREST).save(folder / f"{number}.png", optimize=True)


def make_feedback(file: Path) -> None:
    """Write records with one image, with two in one or two messages, and with none, all of different texts."""
    generator = random.Random(7)
    said: set[str] = set()

    def words(least: int, most: int) -> str:
        text = " ".join(generator.choices(WORDS, k=generator.randint(least, most)))
        return words(least, most) if text in said or said.add(text) else text  # type: ignore[func-returns-value]

    def spoken(role: str, text: str, shown: int = 0) -> dict[str, Any]:
        return {"role": role, "content": [*[{"type": "image"}] * shown, {"type": "text", "text": text}]}

    with file.open("w") as stream:
        for index in range(NUM_RECORDS):
            shown = (1, 1, 0, 0, 2, 1, 2, 0)[index % 8]
            images = [f"images/{generator.randrange(len(SIZES))}.png" for _ in range(shown)]
            prompt = [spoken("user", words(2, 6), min(shown, 1 + index // 8 % 2))]
            if shown == 2 and index // 8 % 2 == 0:  # the other one in a later turn
                prompt += [spoken("assistant", words(1, 4)), spoken("user", words(2, 5), 1)]
            completion = [spoken("assistant", words(2, 9))]
            record = {"prompt": prompt, "completion": completion, "images": images, "label": generator.random() < 0.5}
            stream.write(json.dumps(record) + "\n")


class VisionTrainer(RecordingTrainer):
    """Keeps tokens too, which TRL makes only when it makes a batch.

    Attributes:
        tokens: Prompt, completion and completion of the KL set of each record, in the order they were seen.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.tokens: list[tuple[list[int], ...]] = []

    def compute_loss(self, model: Any, inputs: Mapping[str, torch.Tensor], *arguments: Any, **keywords: Any) -> Any:
        """Return TRL's loss of one micro-batch."""
        for row in range(len(inputs["label"])):
            parts = [self._divided(inputs, prefix, row) for prefix in ("", "KL_")]
            assert parts[0][0] == parts[1][0]  # a prompt stays
            self.tokens.append((*parts[0], parts[1][1]))
        return super().compute_loss(model, inputs, *arguments, **keywords)

    @staticmethod
    def _divided(inputs: Mapping[str, torch.Tensor], prefix: str, row: int) -> tuple[list[int], list[int]]:
        ids, seen, answered = (
            inputs[prefix + name][row] for name in ("input_ids", "attention_mask", "completion_mask")
        )
        return ids[seen.bool() & ~answered.bool()].tolist(), ids[answered.bool()].tolist()

    def ids_of(self, index: int) -> list[int]:
        """Return the tokens of a record, as the processor makes them of the whole conversation."""
        record = self.train_dataset[index]
        conversation = [*record["prompt"], *record["completion"]]
        text = self.processing_class.apply_chat_template(conversation, tokenize=False)
        images = record["images"] or None
        return list(self.processing_class(images=images, text=text, add_special_tokens=False)["input_ids"][0])


def data_of(case: dict[str, Any]) -> Dataset:
    """Return the records with their images, as TRL takes them."""
    records = [json.loads(line) for line in FEEDBACK.read_text().splitlines()]
    for record in records:
        images = [Image.open(FOLDER / name) for name in record["images"]]
        record["images"] = [Image.new("RGB", image.size) for image in images] if case["blank"] else images
    return Dataset.from_list(records)


def train(case: dict[str, Any], output: str) -> VisionTrainer:
    """Return a trainer that has taken all steps; `case` is one of `CASES`."""
    arguments = arguments_of(case, output, SETTINGS)
    trainer = VisionTrainer(model=str(MODEL), args=arguments, train_dataset=data_of(case))
    if case["trained"] == "none":
        for part in (trainer.model.model.vision_tower, trainer.model.model.multi_modal_projector):
            part.requires_grad_(False)
    trainer.train()
    assert len(trainer.steps) == SETTINGS["steps"]
    return trainer


def tokens_of(trainers: list[VisionTrainer]) -> dict[str, Any]:
    """Return the tokens of all records, which no setting changes, and the completions of each KL set."""
    samples = [[kept[:2] for kept in trainer.tokens] for trainer in trainers]
    assert all(one == samples[0] for one in samples)
    prompts, completions = zip(*samples[0][:NUM_RECORDS], strict=True)
    return {
        "prompt_ids": prompts,
        "completion_ids": completions,
        "label": list(trainers[0].train_dataset["label"]),
        "kl_completion_ids": {
            str(trainer.args.per_device_train_batch_size): [kept[2] for kept in trainer.tokens[:NUM_RECORDS]]
            for trainer in trainers
        },
    }


def main() -> None:
    """Write the series of all runs."""
    torch.set_num_threads(1)
    if not MODEL.exists():
        make_model(MODEL)
    if not IMAGES.exists():
        make_images(IMAGES)
    if not FEEDBACK.exists():
        make_feedback(FEEDBACK)
    trainers, runs = [], {}
    for values in CASES:
        case = {**dict(zip(CASE_FIELDS, values, strict=True)), "loss_type": "kto", "desirable_weight": 1.33}
        with tempfile.TemporaryDirectory() as output:
            trainer = train(case, output)
        name = f"{case['trained']}{'-blank' if case['blank'] else ''}-{case['micro_batch_size']}of8"
        runs[name] = {**case, "steps": trainer.steps}
        trainers.append(trainer)
    write_series(SERIES, SETTINGS, tokens_of(trainers), runs)


if __name__ == "__main__":
    main()
