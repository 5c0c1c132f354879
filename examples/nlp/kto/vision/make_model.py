"""Trains the model of this example: python examples/nlp/kto/vision/make_model.py [folder]

A LLaVA (SigLIP tower, projector, Llama) of about 400 thousand parameters learns, by plain supervised training, to say
what is in a picture of `shapes.py`, and to answer the question for the circle's colour with the colour of one of the
two shapes, whichever: about half of its answers are right. This is the starting point that KTO then moves.

CPU, one thread, about two minutes. The same files come out again with the same versions of torch, tokenizers and
pillow on the same kind of processor; elsewhere the last digits of the weights may differ.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from shapes import COLOURS, QUESTION, REQUEST, SHAPES, SIDE, Scene
from shared import draw_number
from teaching import (
    IGNORED,
    ROLES,
    fix_arithmetic,
    make_generation_config,
    make_llama_config,
    make_tokenizer,
    save,
    supervised_steps,
)
from torch import Tensor
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

MODEL_FOLDER = Path(__file__).resolve().parent / "model"
IMAGE = "<image>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PATCH = 12
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SEED = 20240202
NUM_STEPS = 900
BATCH_SIZE = 32
PEAK_LEARNING_RATE = 2e-3
PRINT_EVERY = 100


def make_processor() -> LlavaProcessor:
    """Returns tokenizer, image processor (the one that needs no torchvision) and chat template."""
    texts = [QUESTION, REQUEST]
    for circle in COLOURS:
        for square in COLOURS:
            scene = Scene(circle, square, key="")
            texts += [*scene.answers, scene.describe(), scene.describe(SHAPES[:1]), scene.describe(SHAPES[1:])]
    return LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        tokenizer=make_tokenizer(texts, (*ROLES, IMAGE)),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
    )


def make_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """Returns the untrained model."""
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**TOWER, image_size=SIDE, patch_size=PATCH, vision_use_head=False),
        text_config=make_llama_config(processor.tokenizer, hidden_size=96, intermediate_size=192),
        image_token_index=processor.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=(SIDE // PATCH) ** 2,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = make_generation_config(processor.tokenizer)
    return model


def draw_example(key: str) -> tuple[Any, str, str]:
    """Returns a picture, what is said to it and the answer to learn, drawn from `key`.

    Pictures of one shape are there for the shapes to be told apart soon, descriptions for the model to know which
    colour is whose. The question is answered with either colour, the wrong one as often as the right one.
    """
    circle, square, kind, coin = (draw_number(f"{key}/{what}") for what in ("circle", "square", "kind", "coin"))
    colours = list(COLOURS)
    scene = Scene(colours.pop(circle % len(colours)), colours[square % len(colours)], key)
    if kind % 10 < 3:
        return scene.draw(), QUESTION, scene.answers[coin % 2]
    shapes = SHAPES if kind % 10 < 7 else SHAPES[coin % 2 :][:1]
    return scene.draw(shapes), REQUEST, scene.describe(shapes)


def make_batch(processor: LlavaProcessor, step: int) -> tuple[dict[str, Tensor], Tensor]:
    """Returns a step's inputs and its labels [b, s], int64, right-padded: `IGNORED` except on answers and END."""
    examples = [draw_example(f"teaching/{step}/{row}") for row in range(BATCH_SIZE)]
    prompts, wholes = [], []
    for _, question, answer in examples:
        dialog = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
            {"role": "assistant", "content": answer},
        ]
        prompts.append(processor.apply_chat_template(dialog[:1], add_generation_prompt=True))
        wholes.append(processor.apply_chat_template(dialog))
    pictures = [picture for picture, _, _ in examples]
    inputs = processor(images=pictures, text=wholes, padding=True, padding_side="right", return_tensors="pt")
    labels = inputs["input_ids"].clone()
    labels[inputs["attention_mask"] == 0] = IGNORED
    for row, prompt in enumerate(processor(images=pictures, text=prompts)["input_ids"]):
        assert inputs["input_ids"][row, : len(prompt)].tolist() == prompt, prompts[row]
        labels[row, : len(prompt)] = IGNORED
    return dict(inputs), labels


def fit(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    """Trains `model` on new pictures in each of `NUM_STEPS` steps."""
    step = supervised_steps(model, NUM_STEPS, PEAK_LEARNING_RATE)
    start, total = time.monotonic(), 0.0
    for number in range(1, NUM_STEPS + 1):
        inputs, labels = make_batch(processor, number)
        total += step(model(**inputs, labels=labels).loss)
        if number % PRINT_EVERY == 0:
            print(
                f"step {number}/{NUM_STEPS}  loss {total / PRINT_EVERY:.4f}  {time.monotonic() - start:.0f} s",
                flush=True,
            )
            total = 0.0


def main(folder: Path) -> None:
    """Trains tokenizer and model and writes them to `folder`."""
    fix_arithmetic(SEED)
    processor = make_processor()
    model = make_model(processor)
    print(f"{model.num_parameters():,} parameters, {len(processor.tokenizer)} tokens")
    fit(model, processor)
    save(folder, model, processor)


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else MODEL_FOLDER)
