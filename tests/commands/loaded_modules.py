"""Runs a script as if it were called, and writes down which modules are loaded when it ends.

    loaded_modules.py SCRIPT [ARGUMENT ...]

The file named in the environment variable LOADED gets a name in each line. An error of this package ends a process
with os._exit, anything else in the ordinary way.
"""

import atexit
import os
import runpy
import sys

leave, file = os._exit, os.environ.pop("LOADED", "")


def write() -> None:
    with open(file, "w", encoding="utf-8") as stream:
        stream.writelines(f"{name}\n" for name, module in list(sys.modules.items()) if module is not None)


def write_and_leave(code: int) -> None:
    write()
    leave(code)


if __name__ == "__main__":
    os._exit = write_and_leave  # type: ignore[assignment]
    atexit.register(write)
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
