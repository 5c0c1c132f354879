"""Prompts that show images: tokens and pixels are those of transformers' processors."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image as pillow
from tokenizers import Tokenizer

from nemo_kto.data.reading.records import BadRecord, FeedbackRecord, Image, RecordError
from nemo_kto.data.tokens.image_files import image_key
from nemo_kto.data.tokens.rendering import TokenizationSettings
from nemo_kto.data.tokens.tokenization import Encoder, prompt_key, token_key
from nemo_kto.data.tokens.tokenizer import load_tokenizer
from nemo_kto.errors import ConfigError
from nemo_kto.runs.records import image_tokens
from tests.data.tiny_processors import (
    KINDS,
    drawn,
    encoded,
    picture_record,
    png,
    reference_processor,
    shows,
    write_folder,
)
from tests.data.writings import CONVERSATIONS, assistant

SIZES = [(30, 20), (23, 61), (50, 40)]


class Family:
    """A family's folder, with what is made of it here and in transformers."""

    def __init__(self, name, folder):
        self.name, self.kind = name, KINDS[name]
        self.folder = write_folder(name, folder)
        self.tokenizer = load_tokenizer(folder)
        self.images = image_tokens(folder)
        self.reference = reference_processor(name, folder, self.tokenizer)

    def encoder(self, **settings):
        return Encoder(self.tokenizer, TokenizationSettings(**settings), self.images)

    def encode(self, record, **settings):
        (result,) = self.encoder(**settings).encode([record])
        return result

    def reference_ids(self, messages, images, **options):
        """Ids of messages in which people's special tokens are text, and the images' inputs."""
        images = iter(images)
        filled = [
            {**message, "content": [_filled(part, images) for part in _parts(message["content"])]}
            for message in messages
        ]
        output = self.reference.apply_chat_template(
            filled, tokenize=True, return_dict=True, return_tensors="pt", **options
        )
        return output["input_ids"][0].tolist(), output

    def sanitized(self, messages, images, **options):
        if self.name != "llava":  # whose template writes no special tokens, which transformers insists on for this
            return self.reference_ids(messages, images, sanitize_control_tokens=True, **options)[0]
        text = self.reference.apply_chat_template(
            [{**message, "content": _parts(message["content"])} for message in messages], **options
        )
        backend = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        backend.encode_special_tokens = True
        pieces = [backend.encode(piece, add_special_tokens=False).ids for piece in text.split("<image>")]
        ids = [backend.token_to_id("<s>"), *pieces[0]]
        for piece in pieces[1:]:
            ids += [self.images.image_token_id] * 4 + piece
        return ids


def _parts(content):
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _filled(part, images):
    return {"type": "image", "image": next(images)} if part["type"] == "image" else part


@pytest.fixture(scope="module", params=[*KINDS])
def family(request, tmp_path_factory):
    return Family(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    made = {}

    def of(name):
        if name not in made:
            made[name] = Family(name, tmp_path_factory.mktemp(name))
        return made[name]

    return of


def with_images(conversation, where):
    """The messages of a conversation, `where[i]` images in front of the text of the i-th user's message."""
    numbers = iter(where)
    return [
        {**message, "content": shows(message["content"], number)}
        if message["role"] == "user" and (number := next(numbers, 0))
        else message
        for message in conversation.messages
    ]


@pytest.mark.parametrize("where", [(), (1,), (2,), (1, 2), (0, 1)], ids=str)
def test_tokens_and_pixels_are_those_of_transformers(family, where):
    for conversation in CONVERSATIONS:
        messages = with_images(conversation, where)
        shown = sum(where[: (len(messages) + 1) // 2])
        sizes = [*SIZES[:shown]]
        files = [png(*size) for size in sizes]
        pictures = [drawn(*size) for size in sizes]
        prompt = family.sanitized(messages, pictures, add_generation_prompt=True)
        for text in (conversation.good, conversation.bad):
            record = FeedbackRecord(
                messages, [assistant(text)], True, "f", 1, images=tuple(Image(data=file) for file in files)
            )
            found = family.encode(record)
            if not text.strip() and family.name == "gemma3":  # whose template trims
                assert "writes nothing of the answer" in found.reason
                continue
            whole = family.sanitized([*messages, assistant(text)], pictures)
            assert found.prompt == prompt == whole[: len(prompt)]
            answer = whole[len(prompt) :]
            eos = family.tokenizer.eos_token_id
            if family.kind.end is None:
                answer = [*answer, eos]
            else:
                end = family.tokenizer.convert_tokens_to_ids(family.kind.end)
                answer = answer[: len(answer) - answer[::-1].index(end)]
            assert found.response == answer
            assert [image.key for image in found.images] == [image_key(file) for file in files]
        if shown:
            _, output = family.reference_ids(
                [{"role": "user", "content": shows("x", shown)}], pictures, add_generation_prompt=True
            )
            reader = family.encoder().images
            inputs = [reader.inputs(file) for file in files]
            names = {"pixel_values", "image_grid_thw"} & {*output}
            for name in names:
                assert torch.equal(torch.cat([of[name] for of in inputs]), output[name])
            assert {name for of in inputs for name in of} == names


def test_spelled_placeholders_are_text(family):
    placeholder = family.reference.image_token
    record = picture_record([png(30, 20)], f"what is {placeholder} in {family.kind.image_token}?", f"a {placeholder}")
    found = family.encode(record)
    token = family.images.image_token_id
    assert found.prompt.count(token) == found.images[0].stand.num_tokens and token not in found.response
    assert placeholder in family.tokenizer.decode(found.response)
    control = family.encode(record, special_tokens="control")
    times = 2 if family.name == "gemma3" else 3  # whose template writes another token than the one that is repeated
    assert control.reason == f"the chat template writes {placeholder} {times} times for 1 images."


def test_the_first_token_of_an_image_is_where_it_is_said(family):
    found = family.encode(picture_record([png(30, 20)]))
    assert found.prompt.index(family.images.image_token_id) == found.image_start > 1
    assert family.encode(picture_record([])).image_start == 0


def test_grids_are_those_of_the_model(families):
    (image,) = families("qwen2_5_vl").encode(picture_record([png(30, 20)])).images
    grid = families("qwen2_5_vl").reference.image_processor([drawn(30, 20)])["image_grid_thw"][0]
    assert (image.stand.rows, image.stand.columns) == (grid[1] // 2, grid[2] // 2) == (2, 4)
    (image,) = families("llava").encode(picture_record([png(30, 20)])).images
    assert (image.stand.rows, image.stand.columns, image.stand.num_tokens) == (0, 0, 4)


def test_inference_sends_the_same_prompt(family):
    record = picture_record([png(*SIZES[0]), png(*SIZES[1])])
    encoder = family.encoder()
    seen = encoder.see(record.images)
    (found,) = encoder.encode([record])
    assert encoder.encode_prompt(record.prompt, seen) == found.prompt
    with pytest.raises(RecordError, match="1 times for 2 images"):
        encoder.encode_prompt([{"role": "user", "content": shows("x")}], seen)


@pytest.mark.parametrize("template", ["chat_template.json", "processor_config.json"])
def test_a_template_of_the_processor_only(template, tmp_path):
    write_folder("llava", tmp_path, template=None)
    assert load_tokenizer(tmp_path).chat_template is None
    file = tmp_path / template
    settings = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(settings | {"chat_template": KINDS["llava"].template}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_template == KINDS["llava"].template
    (found,) = Encoder(tokenizer, TokenizationSettings(), image_tokens(tmp_path)).encode(
        [picture_record([png(30, 20)])]
    )
    assert tokenizer.decode(found.prompt) == f"<s>USER: {'<image>' * 4}\nwhat is the answer ASSISTANT:"
    file.write_text("[]")
    with pytest.raises(ConfigError, match=f"{template} is not a JSON object"):
        load_tokenizer(tmp_path)


def test_a_template_without_images(families, tmp_path):
    family = families("qwen2_5_vl")
    tokenizer = load_tokenizer(write_folder("qwen2_5_vl", tmp_path))
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}<|im_end|>{% endfor %}"
    (bad,) = Encoder(tokenizer, TokenizationSettings(), family.images).encode([picture_record([png(30, 20)])])
    assert bad.reason == (
        "the chat template writes nothing for an image, where <|image_pad|> is expected. Use the template of the "
        "model's processor, in chat_template.jinja or chat_template.json."
    )


def test_a_model_that_takes_no_images(families):
    (bad,) = Encoder(families("llava").tokenizer, TokenizationSettings()).encode([picture_record([png(30, 20)])])
    assert isinstance(bad, BadRecord) and bad.reason.startswith("the record has an image, and this model takes none")


@pytest.mark.parametrize(
    "content", [shows("question"), [{"type": "text", "text": "question"}, {"type": "image"}]], ids=["front", "behind"]
)
def test_system_messages_are_merged_with_parts(families, content):
    family = families("qwen2_5_vl")
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    record = replace(picture_record([png(30, 20)]), prompt=prompt)
    text = family.tokenizer.decode(family.encode(record, system="merge_into_user").prompt)
    shown = f"<|vision_start|>{'<|image_pad|>' * 8}<|vision_end|>"
    body = f"Be brief.\n\n{shown}question" if content[0]["type"] == "image" else f"Be brief.\n\nquestion{shown}"
    assert f"<|im_start|>user\n{body}<|im_end|>" in text


def test_a_system_message_with_an_image_is_not_dropped(families):
    family = families("qwen2_5_vl")
    prompt = [{"role": "system", "content": shows("Look.")}, {"role": "user", "content": "question"}]
    record = replace(picture_record([png(30, 20)]), prompt=prompt)
    assert "which is left out, has an image. Set" in family.encode(record, system="drop").reason
    merged = family.tokenizer.decode(family.encode(record, system="merge_into_user").prompt)
    assert "<|vision_end|>Look.\n\nquestion<|im_end|>" in merged


def test_losing_the_text_beside_an_image_is_said(families):
    family = families("qwen2_5_vl")
    tokenizer = load_tokenizer(family.folder)
    tokenizer.chat_template = tokenizer.chat_template.replace("{% elif 'text' in content %}{{ content['text'] }}", "")
    encoder = Encoder(tokenizer, TokenizationSettings(), family.images)
    (found,) = encoder.encode([picture_record([png(30, 20)])])
    assert [note.kind for note in found.notes] == ["the chat template leaves out a user's message"]


def test_only_the_first_frame_counts_and_that_is_said(families):
    frames = [drawn(30, 20, seed) for seed in range(3)]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    found = families("llava").encode(picture_record([gif]))
    assert found.notes[-1].kind == "an image has several frames, of which the first is taken"
    first = families("llava").encoder().images.inputs(encoded(frames[0], "GIF"))
    assert torch.equal(families("llava").encoder().images.inputs(gif)["pixel_values"], first["pixel_values"])


def test_what_is_loaded_stays_in_its_process(families):
    encoder = families("qwen2_5_vl").encoder()
    record = picture_record([png(30, 20)])
    assert pickle.loads(pickle.dumps(encoder)).encode([record]) == encoder.encode([record])
    assert len(pickle.dumps(encoder.images)) == len(pickle.dumps(families("qwen2_5_vl").encoder().images))


def test_text_keeps_its_keys(families):
    (found,) = families("llava").encoder().encode([picture_record([])])
    assert found.images == () and prompt_key(np.array(found.prompt)) == token_key(found.prompt)
    golden = int.from_bytes(bytes.fromhex("96a3cf72d606b6a4"), "little") >> 1  # of the first release
    assert prompt_key(torch.tensor([1, 2])) == token_key([1, 2]) == golden
    assert len({prompt_key(torch.tensor([1, 2]), images) for images in ((), (3,), (4,), (3, 4), (4, 3))}) == 5


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gemma3", {"do_pan_and_scan": True}, "do_pan_and_scan is not supported"),
        ("llava", {"image_processor_type": "NoSuchProcessor"}, "its processor of images cannot be loaded"),
        ("llava", {"auto_map": {"AutoImageProcessor": "x.X"}, "image_processor_type": "X"}, "cannot be loaded"),
    ],
)
def test_folders_that_cannot_be_used(name, change, message, tmp_path):
    write_folder(name, tmp_path, **change)
    (tmp_path / "x.py").write_text("raise SystemExit('code of the folder ran')")
    encoder = Encoder(load_tokenizer(tmp_path), TokenizationSettings(), image_tokens(tmp_path))
    with pytest.raises(ConfigError, match=message):
        encoder.encode([picture_record([png(30, 20)])])
    assert encoder.encode([picture_record([])])[0].response  # text needs none of it


def test_folders_that_lack_something(tmp_path):
    write_folder("llava", tmp_path)
    (tmp_path / "processor_config.json").write_text("{}")
    record = picture_record([png(30, 20)])

    def encode():
        encoder = Encoder(load_tokenizer(tmp_path), TokenizationSettings(), image_tokens(tmp_path))
        return encoder.encode([record])

    with pytest.raises(ConfigError, match="nothing tells by how many tokens LlavaProcessor shows an image"):
        encode()
    for name in ("processor_config.json", "preprocessor_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match="the folder has no image processor"):
        encode()
    write_folder("llava", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"image_token_index": 7}))
    with pytest.raises(ConfigError, match="The two do not belong together"):
        encode()


def test_text_only_models_are_not_asked(tmp_path):
    assert image_tokens(tmp_path) is None
    (tmp_path / "config.json").write_text('{"model_type": "mistral3"}')
    assert image_tokens(tmp_path) is None
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="is not a JSON object"):
        image_tokens(tmp_path)


def test_digests_tell_processors_apart(tmp_path):
    digests = set()
    for number, change in enumerate(({}, {"crop_size": {"height": 14, "width": 14}})):
        digests.add(image_tokens(write_folder("llava", tmp_path / str(number), **change)).digest())
    same = image_tokens(write_folder("llava", tmp_path / "same")).digest()
    assert len(digests) == 2 and same in digests


def test_shades_that_are_lost_are_said(families, tmp_path):
    deep = encoded(pillow.fromarray(np.full((20, 30), 30_000, dtype=np.uint16)))
    (found,) = families("llava").encoder().encode([picture_record([deep])])
    assert [note.kind for note in found.notes if "shades" in note.kind] == [
        "an image has more than 256 shades of grey, of which all but the darkest are white, as in transformers"
    ]
    (found,) = families("llava").encoder().encode([picture_record([encoded(drawn(30, 20).convert("L"))])])
    assert not [note.kind for note in found.notes if "shades" in note.kind]


def test_a_text_that_spells_an_image_is_none(families):
    """Of strings that are taken as they are, which were perhaps parted from their images."""
    family = families("llava")
    record = FeedbackRecord("<image>what is it", "a cat", True, "data.jsonl", 3)
    (bad,) = family.encoder().encode([record])
    assert isinstance(bad, BadRecord) and bad.reason.startswith(
        "the prompt has 1 tokens '<image>', and its images take 0"
    )
    with pytest.raises(RecordError, match="its images take 0"):
        family.encoder().encode_prompt("<image>what is it")
    settings = TokenizationSettings(special_tokens="text")
    (found,) = Encoder(load_tokenizer(family.folder), settings, family.images).encode([record])
    assert family.images.image_token_id not in found.prompt and found.image_start == 0
