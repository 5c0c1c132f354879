"""Qwen2.5-VL, its language model: Qwen2, whose rotary embedding counts rows and columns of an image."""

from __future__ import annotations

from dataclasses import replace

from nemo_kto.network.families import qwen2

FAMILY = replace(qwen2.LIKE, rotary_sections=True, alone=False, part_of=("qwen2_5_vl",))
