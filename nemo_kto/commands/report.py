"""The command `nemo-kto report`."""

from __future__ import annotations

import argparse

from nemo_kto.errors import ConfigError
from nemo_kto.reporting.report import write_report


def run(options: argparse.Namespace) -> None:
    """Write the page of one run or several."""
    output = options.output
    if output is None:
        if len(options.log_dirs) > 1:
            raise ConfigError("The page of several runs needs a folder of its own. Name one with --output FOLDER.")
        output = options.log_dirs[0] / "report"
    print(f"Wrote {write_report(options.log_dirs, output)}")
