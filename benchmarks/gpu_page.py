"""Write "Measured" of docs/gpu.md from what `gpu_first_hour.sh` has left: see there.

python benchmarks/gpu_page.py FOLDER [--page FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from common import RESULTS, markdown

PAGE = Path(__file__).resolve().parent.parent / "docs" / "gpu.md"
HEADING = "## Measured"

HARDWARE = ("cpu", "cores", "memory_gib", "gpus", "threads")
"""What a machine's description has besides versions."""

TABLES = {"rate_of_the_training_pass": "Rate of the training pass", "where_the_time_goes": "Where the time goes"}
"""Further tables that a benchmark's JSON may have -> their titles."""


def main() -> None:
    """Replace the section, which is the page's last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the script has left a .tsv for every part")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the benchmarks have left their figures")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    before, _, _ = options.page.read_text(encoding="utf-8").partition(HEADING)
    section = "\n\n".join(paragraphs(options.folder, options.results))
    options.page.write_text(f"{before}{HEADING}\n\n{section}\n", encoding="utf-8")
    print(f"written to {options.page}")


def paragraphs(folder: Path, results: Path) -> Iterator[str]:
    """Yield the section's paragraphs: when and on what, how the parts ended, and the benchmarks' tables."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(results.glob("*.json"))]
    on_gpus = [content for content in found if content["machine"]["gpus"]]
    yield f"By `benchmarks/gpu_first_hour.sh` on {date.today()}, commit {commit()}."
    for machine in {json.dumps(content["machine"], sort_keys=True) for content in on_gpus}:
        yield described(json.loads(machine))
    parts = [file.read_text(encoding="utf-8").split() for file in sorted(folder.glob("*.tsv"))]
    yield markdown(
        [{"part": part, "exit code": code, "minutes": f"{int(seconds) / 60:.1f}"} for part, code, seconds in parts]
    )
    for content in on_gpus:
        yield f"### {content['benchmark']}"
        yield markdown(content["rows"])
        for name, title in TABLES.items():
            if name in content:
                yield f"{title}:"
                yield markdown(content[name])


def commit() -> str:
    """Return what is checked out; with a plus if files have changed since."""
    git = ["git", "-C", str(PAGE.parent)]
    try:
        name = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True
        ).stdout
        changed = subprocess.run([*git, "status", "--porcelain"], check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):  # an image has no history
        return "unknown"
    return name.strip() + ("+" if changed else "")


def described(machine: Mapping[str, Any]) -> str:
    """Return a machine in words."""
    gpus = machine["gpus"]
    kinds = ", ".join(f"{gpus.count(kind)} x {kind}" for kind in dict.fromkeys(gpus))
    packages = ", ".join(f"{name} {value}" for name, value in machine.items() if name not in HARDWARE)
    return f"{kinds}; {machine['cores']} cores ({machine['cpu']}), {machine['memory_gib']} GiB; {packages}."


if __name__ == "__main__":
    main()
