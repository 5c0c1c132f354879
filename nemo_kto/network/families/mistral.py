"""Mistral: Llama with a sliding window, if its configuration has one."""

from __future__ import annotations

from dataclasses import replace

from nemo_kto.network.families import llama
from nemo_kto.network.family import sliding_window

FAMILY = replace(llama.LIKE, fields=sliding_window, part_of=("llava", "mistral3"))
