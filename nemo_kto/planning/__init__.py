"""What a run would take of GPUs that are not at hand: memory, time, and which layouts suit."""
