"""The README.md of an exported folder: what the model is, what it was trained on and how, and how to use it."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nemo_kto.config.folders import FACTS_FILE

_SETTINGS = (
    "model.kto.loss",
    "model.kto.ref_policy_kl_penalty",
    "model.kto.desirable_loss_weight",
    "model.kto.undesirable_loss_weight",
    "model.kto.kl_scope",
    "model.kto.loss_reduction",
    "model.kto.humanline_clamp",
    "model.kto.sft_loss_weight",
    "model.kto.reference.mode",
    "model.global_batch_size",
    "model.optim.lr",
    "model.optim.weight_decay",
    "model.optim.sched.name",
    "model.optim.sched.warmup_steps",
    "model.data.seq_length",
    "model.peft.peft_scheme",
    "model.peft.lora_tuning.adapter_dim",
    "model.peft.quantize_base",
    "trainer.precision",
    "model.seed",
)
"""Keys whose values say what was optimised and how."""

_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Categories of characters that break a line, hide, turn others around, or are none."""

_METRICS = (
    "val/loss",
    "val/kl",
    "val/rewards/chosen",
    "val/rewards/rejected",
    "val/rewards/margins",
    "val/rewards/accuracies",
    "train/loss",
    "train/rewards/margins",
    "train/rewards/accuracies",
)

_METHODS = {
    "kto": "Kahneman-Tversky Optimization ([KTO](https://arxiv.org/abs/2402.01306))",
    "apo_zero_unpaired": "the unpaired variant of Anchored Preference Optimization "
    "([APO-zero](https://arxiv.org/abs/2408.06266))",
    "bco": "Binary Classifier Optimization ([BCO](https://arxiv.org/abs/2404.04656))",
}


def _method(loss: str) -> str:
    return _METHODS.get(loss, f"KTO with the loss {_code(loss)}")


_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
"""

_USE_ADAPTER = """```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")  # finds the base model by adapter_config.json
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
"""

_USE_ADAPTER_OF_WHOLE = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(
    AutoModelForCausalLM.from_pretrained("path/to/the/base/model"), "path/to/this/folder"
)
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
"""

_CHAT = """messages = [{"role": "user", "content": "Hello!"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
"""

_TEXT = """inputs = tokenizer("Hello!", return_tensors="pt")
"""

_GENERATE = """answer = model.generate(**inputs, max_new_tokens=200)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""


def read_facts(folder: Path) -> dict[str, Any]:
    """Return what the `FACTS_FILE` in a folder says; nothing if there is none."""
    file = folder / FACTS_FILE
    facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return facts


def model_card(facts: Mapping[str, Any], metrics: Mapping[str, float], *, step: int, adapter: bool) -> str | None:
    """Return the text of README.md; None where nothing is known of the run.

    Of folders and files it names the last part only: a model travels further than the paths of where it was made.

    Args:
        facts: What `nemo_kto.runs.facts` wrote.
        metrics: The run's last metrics, with their stage in front: `val/loss`.
        step: Steps that were taken.
        adapter: Whether the folder holds a PEFT adapter rather than a whole model.
    """
    if "config" not in facts:  # an older checkpoint, which only says which run it is of
        return None
    config = facts["config"]
    base = config["pretrained_checkpoint"]["restore_from_path"]
    kind = "LoRA adapter" if adapter else "model"
    sections = [
        _front_matter(config, adapter=adapter),
        f"# {_plain(facts['name'])}\n",
        f"A {kind} aligned from thumbs up and thumbs down by {_method(config['model']['kto']['loss'])}.\n",
        f"* Base model: {_code(Path(base).name) if base else 'none; training began with random weights'}",
        f"* Steps: {step}, of {config['model']['global_batch_size']} samples each\n",
        "## Data\n",
        _table(
            ("split", "samples", "thumbs up", "thumbs down", "files"),
            [_split(*item) for item in facts["data"].items()],
        ),
        "## Last metrics\n",
        _table(("metric", "value"), [(_code(name), f"{metrics[name]:.4g}") for name in _METRICS if name in metrics]),
        "Rewards are beta times the log-ratio of the model to its reference; `val` is held-out data.\n",
        "## Settings\n",
        _table(("key", "value"), [(_code(key), _code(value)) for key, value in _settings(config)]),
        "Versions: " + _plain(", ".join(f"{name} {version}" for name, version in facts["versions"].items())) + "\n",
        "## How to use it\n",
        _use(facts, adapter=adapter) + (_CHAT if facts["chat_template"] else _TEXT) + _GENERATE,
        "The license and the limits of the base model hold for this one too.\n",
    ]
    return "\n".join(sections)


def _front_matter(config: Mapping[str, Any], *, adapter: bool) -> str:
    tags = ["kto", "alignment", "human-feedback", "nemo_kto", *(["lora"] if adapter else [])]
    lines = [
        f"library_name: {'peft' if adapter else 'transformers'}",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {tag}" for tag in tags),
    ]
    if adapter:  # PEFT's own cards have it; for a whole model a folder's path is no name of a model
        name = _one_line(Path(config["pretrained_checkpoint"]["restore_from_path"]).name)
        quoted = yaml.safe_dump(name, default_style='"', allow_unicode=True, width=10**6).strip()
        lines.append(f"base_model: {quoted}")
    return "\n".join(["---", *lines, "---", ""])


def _use(facts: Mapping[str, Any], *, adapter: bool) -> str:
    """Return how the model is loaded; one that sees images is no causal language model to transformers."""
    whole = bool(facts.get("sees_images"))
    use = (_USE_ADAPTER_OF_WHOLE if whole else _USE_ADAPTER) if adapter else _USE
    use = use.replace("ForCausalLM", "ForImageTextToText") if whole else use
    peft = facts["config"]["model"]["peft"]
    if not adapter or peft.get("quantize_base") is None:
        return use
    bits = "load_in_8bit=True"
    if peft["quantize_base"] == "nf4":
        bits = f'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant={peft["double_quantization"]}'
    folder = '"path/to/the/base/model"' if whole else '"path/to/this/folder"'
    said = f"It was trained beside its base model in {peft['quantize_base']}, which the numbers above are of.\n\n"
    settings = f"AutoTokenizer, BitsAndBytesConfig\n\nbits = BitsAndBytesConfig({bits})\n"
    loaded = use.replace(f"{folder})", f"{folder}, quantization_config=bits)", 1)
    return said + loaded.replace("AutoTokenizer\n", settings, 1)


def _split(name: str, data: Mapping[str, Any]) -> tuple[str, ...]:
    files = [_code(Path(source["path"]).name) for source in data["sources"]]
    shown = ", ".join(files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")
    return (_plain(name), str(data["samples"]), str(data["desirable"]), str(data["undesirable"]), shown)


def _settings(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    found = []
    for key in _SETTINGS:
        value: Any = config
        for part in key.split("."):
            value = value.get(part)  # an older run has not all of them
        if value is not None and not (
            key.startswith("model.peft.lora") and config["model"]["peft"]["peft_scheme"] != "lora"
        ):
            found.append((key, value))
    return found


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    # in a table a pipe ends a cell, inside of code too
    cells = [tuple(cell.replace("|", "\\|") for cell in row) for row in rows]
    lines = [head, tuple("---" for _ in head), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _one_line(value: Any) -> str:
    """Return a value as one line of text, control characters and what is no text as Python writes them."""
    hidden = {letter for letter in str(value) if unicodedata.category(letter) in _HIDDEN}
    return str(value).translate({ord(letter): letter.encode("unicode_escape").decode() for letter in hidden})


def _code(value: Any) -> str:
    """Return a value as code in Markdown, where nothing has a meaning but backticks, and HTML is text."""
    text = _one_line(value) or " "
    fence = "`" * (1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))
    room = " " if text[0] in "` " or text[-1] in "` " else ""
    return f"{fence}{room}{text}{room}{fence}"


def _plain(value: Any) -> str:
    """Return a value as text in Markdown: signs that mean something there are written as entities."""
    # an underscore inside of a word means nothing
    return re.sub(r"[\\`*\[\]<>&#|~$]|(?<![^\W_])_|_(?![^\W_])", lambda found: f"&#{ord(found[0])};", _one_line(value))
