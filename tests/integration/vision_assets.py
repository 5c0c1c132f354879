"""Tiny models that see images, with their processors, and feedback on images, as `assets.py` has them for texts."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BaseImageProcessor,
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
)

from nemo_kto.data.batches.row_images import Picture
from tests.integration.assets import WORDS, settings
from tests.network import tiny_hf, tiny_vision
from tests.network.tiny_vision import Shown

SPECIAL = ["<unk>", "<pad>", "<eos>", "<image>", "<video>", "<vision_start>", "<vision_end>", "<user>", "<assistant>"]
SIZES = [(16, 16), (24, 16), (8, 24), (40, 21), (48, 48), (13, 9)]
"""Width and height of the images that the feedback shows."""

PLACEHOLDERS = {"gemma3": "<vision_start>", "qwen2_5_vl": "<vision_start><image><vision_end>"}
"""Kind of model -> what its chat template writes for an image, if not the token of images alone."""


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a word, and a template that finds texts in lists of parts only."""
    words = [*SPECIAL, *WORDS]
    words += [f"word{index}" for index in range(len(words), tiny_hf.VOCAB_SIZE)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"image_token": 3, "video_token": 4, "boi_token": 5, "eoi_token": 6}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<user>", "<assistant>"],
        extra_special_tokens={name: SPECIAL[token] for name, token in names.items()},
    )
    fast.chat_template = (
        "{% for message in messages %}{{ '<' + message['role'] + '>' }}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        f"{{{{ '{PLACEHOLDERS.get(kind, '<image>')}' }}}}"
        "{% elif part['type'] == 'text' %}{{ ' ' + part['text'] + ' ' }}{% endif %}{% endfor %}"
        "{{ '<eos>' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    return fast


def image_processor(kind: str) -> BaseImageProcessor:
    """Return what makes pixels of images for a kind of model in `tiny_vision.configs()`."""
    if kind == "qwen2_5_vl":
        return Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=8 * 8, max_pixels=24 * 24)
    if kind == "gemma3":
        return Gemma3ImageProcessorPil(size={"height": 48, "width": 48})
    if kind == "llava_siglip":
        return SiglipImageProcessorPil(size={"height": 16, "width": 16})
    return CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def make_model_folder(folder: Path, kind: str) -> Path:
    """Save a model with random weights and its processor; its tokenizer is in the folder `tokenizer` too.

    Beside models of some types transformers takes another class of tokenizers than what is there.
    """
    tiny_vision.make_folder(folder, tiny_vision.configs()[kind])
    images, tokenizer = image_processor(kind), make_tokenizer(kind)
    tokenizer.save_pretrained(folder / "tokenizer")
    tokenizer.save_pretrained(folder)
    if kind == "qwen2_5_vl":  # its processor's part for videos needs torchvision
        images.save_pretrained(folder)
    elif kind == "gemma3":
        Gemma3Processor(images, tokenizer, image_seq_length=9).save_pretrained(folder)
    else:
        clip = kind != "llava_siglip"
        LlavaProcessor(
            images,
            tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default" if clip else "full",
            num_additional_image_tokens=1 if clip else 0,
            image_token="<image>",
        ).save_pretrained(folder)
    return folder


def write_images(folder: Path) -> list[Path]:
    """Write an image of each size: noise in cells of four pixels."""
    folder.mkdir(exist_ok=True)
    generator = random.Random(3)
    files = []
    for number, (width, height) in enumerate(SIZES):
        cells = -(-width // 4), -(-height // 4)
        image = Image.frombytes("RGB", cells, generator.randbytes(3 * cells[0] * cells[1]))
        files.append(folder / f"{number}.png")
        image.resize((width, height), Image.Resampling.NEAREST).save(files[-1])
    return files


def spoken(role: str, text: str, images: Sequence[str] = ()) -> dict[str, Any]:
    """Return a message; the images are in front of its text."""
    parts = [{"type": "image", "image": image} for image in images]
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}


def write_feedback(file: Path, *, number: int, seed: int) -> Path:
    """Write records with one image, with two in one or two messages, and with none; `write_images` made the images."""
    generator = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(1, most)))

    with file.open("w") as stream:
        for index in range(number):
            kind = generator.choice(["none", "one", "two", "later"])
            shown = [f"images/{generator.randrange(len(SIZES))}.png" for _ in range(2)]
            first = {"none": [], "two": shown}.get(kind, shown[:1])
            prompt = [spoken("user", words(6), first)]
            if kind == "later":
                prompt += [spoken("assistant", words(3)), spoken("user", words(4), shown[1:])]
            # text alone, as people write it
            messages = [*prompt, {"role": "assistant", "content": words(9)}]
            label = index % 4 != 0  # most are liked, which keeps the KL estimate above 0
            stream.write(json.dumps({"messages": messages, "label": label}) + "\n")
    return file


@dataclass(frozen=True)
class Readings:
    """What transformers makes of the feedback in a file for a kind of model."""

    file: Path
    kind: str

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the file."""
        return [json.loads(line) for line in self.file.read_text().splitlines()]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the model's tokenizer."""
        return make_tokenizer(self.kind)

    @cached_property
    def images(self) -> BaseImageProcessor:
        """Return the model's image processor."""
        return image_processor(self.kind)

    def document(self, prompt: int, response: int) -> Shown:
        """Return the prompt of one record with the response of another, each by its number."""
        pictures = self.pictures(prompt)
        text = self.text(self.rows[prompt]["messages"][:-1], pictures, add_generation_prompt=True)
        answer = self.rows[response]["messages"][-1]["content"] + " <eos>"
        ids = [torch.tensor(self.tokenizer(part)["input_ids"]) for part in (text, answer)]
        return Shown(*ids, pictures)

    def pictures(self, number: int) -> tuple[Picture, ...]:
        """Return the images of a record."""
        parts = [part for message in self.rows[number]["messages"][:-1] for part in message["content"]]
        files = [self.file.parent / part["image"] for part in parts if part["type"] == "image"]
        found = []
        for key, file in enumerate(files):
            inputs = dict(self.images(images=[Image.open(file)], return_tensors="pt"))
            # one token for each four patches, for each patch, or for each pool of four patches
            grid = inputs.get("image_grid_thw")
            tokens = 4 if self.kind.startswith("llava") else 9 if grid is None else int(grid.prod()) // 4
            found.append(Picture(key, tokens, None, inputs))
        return tuple(found)

    def text(self, messages: list[dict[str, Any]], pictures: Sequence[Picture], **options: Any) -> str:
        """Return what the chat template writes, with as many tokens for each image as it has features."""
        rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        mark = "<vision_start>" if self.kind == "gemma3" else "<image>"
        pieces = rendered.split(mark)
        stands = [picture.num_tokens * "<image>" for picture in pictures]
        if self.kind == "gemma3":
            stands = [f"\n\n<vision_start>{stand}<vision_end>\n\n" for stand in stands]
        assert len(pieces) == len(stands) + 1
        return "".join(piece + stand for piece, stand in zip(pieces, [*stands, ""], strict=True))


def vision_settings(root: Path, log_dir: Path, kind: str, **changes: Any) -> dict[str, Any]:
    """Return overrides of a short run of a kind of model on the feedback in `root`."""
    folder = root / kind
    changes = {
        "pretrained_checkpoint__restore_from_path": str(folder),
        "model__tokenizer__path": str(folder / "tokenizer"),
        "model__micro_batch_size": 4,
        **changes,
    }
    return settings(root, log_dir, **changes)
