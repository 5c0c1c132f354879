"""From feedback files to batches: records, tokens, global batches. No Megatron: ranks and sizes arrive as integers."""
