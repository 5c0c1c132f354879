"""Names of files in a log folder that one part of the package writes and another reads."""

FACTS_FILE = "run.json"
"""What a run is; also in the folder that every checkpoint gets a copy of."""

ANSWERS_FILE = "generations.jsonl"
"""What policy and reference answered to prompts."""
