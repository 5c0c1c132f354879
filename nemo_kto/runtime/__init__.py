"""Everything that reads or sets Megatron-Core's global state."""
