"""Folders of three families of models that see images, as far as data goes: tokenizer, template, image processor.

Chat templates are those that the families publish, without what they say of videos.
"""

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from PIL import Image as pillow
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoImageProcessor, PreTrainedTokenizerFast

from nemo_kto.data.reading.records import FeedbackRecord, Image
from tests.data.conftest import CORPUS

QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
GEMMA_TEMPLATE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}
"""


@dataclass(frozen=True)
class Kind:
    """A family: its template, the tokens that it knows by name, and its files of configuration."""

    template: str
    processor: str
    special: tuple[str, ...]
    config: dict[str, Any]
    images: dict[str, Any]
    image_token: str
    end: str | None
    bos: str | None = None
    named: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


_RGB = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2], "do_convert_rgb": True}
KINDS = {
    "qwen2_5_vl": Kind(
        QWEN_TEMPLATE,
        "Qwen2_5_VLProcessor",
        ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
        {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]},
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "patch_size": 4,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "size": {"shortest_edge": 16 * 16, "longest_edge": 40 * 40},
            **_RGB,
        },
        "<|image_pad|>",
        "<|im_end|>",
    ),
    "llava": Kind(
        LLAVA_TEMPLATE,
        "LlavaProcessor",
        ("<s>", "</s>", "<image>"),
        {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]},
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 28},
            "crop_size": {"height": 28, "width": 28},
            **_RGB,
        },
        "<image>",
        None,
        bos="<s>",
        settings={
            "patch_size": 14,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
            "image_token": "<image>",
        },
    ),
    "gemma3": Kind(
        GEMMA_TEMPLATE,
        "Gemma3Processor",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>")
        + ("<image_soft_token>",),
        {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]},
        {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 28, "width": 28}, **_RGB},
        "<image_soft_token>",
        "<end_of_turn>",
        bos="<bos>",
        named={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        settings={"image_seq_length": 4},
    ),
}
_TOKEN_FIELD = {"qwen2_5_vl": "image_token_id", "llava": "image_token_index", "gemma3": "image_token_index"}


def write_folder(name: str, folder: Path, *, template: str | None = "chat_template.jinja", **images: Any) -> Path:
    """Writes the folder of a family, its chat template into a file; `images` are other keys of its image processor."""
    kind = KINDS[name]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(kind)
    tokenizer.save_pretrained(folder)
    token = tokenizer.convert_tokens_to_ids(kind.image_token)
    (folder / "config.json").write_text(json.dumps({**kind.config, _TOKEN_FIELD[name]: token}))
    (folder / "preprocessor_config.json").write_text(json.dumps({**kind.images, **images}))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": kind.processor, **kind.settings}))
    if template == "chat_template.jinja":
        (folder / template).write_text(kind.template)
    elif template is not None:
        (folder / template).write_text(json.dumps({"chat_template": kind.template}))
    return folder


def _tokenizer(kind: Kind) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[*kind.special], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    if kind.bos is not None:
        from tokenizers import processors

        token = kind.bos, backend.token_to_id(kind.bos)
        backend.post_processor = processors.TemplateProcessing(single=f"{kind.bos} $A", special_tokens=[token])
    eos = kind.special[1]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=kind.bos, eos_token=eos, extra_special_tokens=dict(kind.named)
    )


def reference_processor(name: str, folder: Path, tokenizer: Any) -> Any:
    """Transformers' own processor, its part for videos a class that does nothing."""
    kind = KINDS[name]
    images = AutoImageProcessor.from_pretrained(folder, backend="pil")
    template = {"chat_template": kind.template}
    if name == "qwen2_5_vl":
        processor = object.__new__(transformers.Qwen2_5_VLProcessor)
        # what its constructor does, but for the video processor, which torchvision would be needed for
        processor.image_processor, processor.tokenizer, processor.video_processor = images, tokenizer, None
        processor.chat_template = kind.template
        processor.image_token, processor.video_token = "<|image_pad|>", "<|video_pad|>"
        processor.image_token_id, processor.video_token_id = tokenizer.convert_tokens_to_ids(
            [processor.image_token, processor.video_token]
        )
        return processor
    return getattr(transformers, kind.processor)(images, tokenizer, **template, **kind.settings)


def drawn(width: int, height: int, seed: int = 0) -> pillow.Image:
    """An image of coloured noise."""
    noise = np.random.default_rng([seed, width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return pillow.fromarray(noise)


def encoded(image: pillow.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of a file with an image in it."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, seed: int = 0) -> bytes:
    """A PNG file of coloured noise."""
    return encoded(drawn(width, height, seed))


def shows(text: str, number: int = 1) -> list[dict[str, Any]]:
    """A content of some images and a text behind them."""
    return [*[{"type": "image"}] * number, {"type": "text", "text": text}]


def picture_record(images: list[bytes], text: str = "what is the answer", answer: str = "yes") -> FeedbackRecord:
    """A record that asks about images."""
    prompt = [{"role": "user", "content": shows(text, len(images))}]
    response = [{"role": "assistant", "content": answer}]
    return FeedbackRecord(prompt, response, True, "data.jsonl", 1, images=tuple(Image(data=one) for one in images))
