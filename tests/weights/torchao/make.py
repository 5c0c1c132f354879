"""Makes the files beside it: matrices as torchao stores them, and the numbers that it makes of them.

python tests/weights/torchao/make.py

It needs torchao, which is not installed for the tests: transformers imports it wherever it is, which takes seconds,
and prints on a CPU. Made with torchao 0.18.0 and torch 2.13.0.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

ROWS, COLUMNS = 6, 64
HERE = Path(__file__).parent


def main() -> None:
    """Write a file for each kind, and `wanted.safetensors`."""
    from torchao import quantization as ao
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    kinds = {
        "int8": ao.Int8WeightOnlyConfig(),
        "int8_groups": ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(16)),
        "int8_whole": ao.Int8WeightOnlyConfig(granularity=ao.PerTensor()),
        "float8": ao.Float8WeightOnlyConfig(),
        "float8_whole": ao.Float8WeightOnlyConfig(granularity=ao.PerTensor()),
        "four_in_eight": ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(16)),
        "three_in_eight": ao.IntxWeightOnlyConfig(
            weight_dtype=torch.int3, granularity=ao.PerAxis(0), mapping_type=ao.MappingType.ASYMMETRIC
        ),
    }
    wanted = {}
    for kind, config in kinds.items():
        layer = torch.nn.Linear(COLUMNS, ROWS, bias=False, dtype=torch.bfloat16)
        layer.weight.data = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)).bfloat16()
        ao.quantize_(layer, config)
        flat, metadata = flatten_tensor_state_dict({"a.weight": layer.weight.detach()})
        flat = {key: value.contiguous() for key, value in flat.items()}
        save_file(flat, HERE / f"{kind}.safetensors", metadata={**metadata, "format": "pt"})
        wanted[kind] = layer.weight.detach().dequantize().bfloat16().contiguous()
    save_file(wanted, HERE / "wanted.safetensors")


if __name__ == "__main__":
    main()
