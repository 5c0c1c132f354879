"""Started as a process by test_token_cache.py: tokenises a file into a cache and prints what it found and did.

    cache_process.py FILE FOLDER KIND WORKERS LOCKS

KIND is the encoder: `held` waits, in its first call, for a line on stdin; `endless` never returns. Both print
`encoding <process>` then. LOCKS is 0 where the file system has none. It prints `ready`, goes on when a line arrives,
and ends with `<samples> <calls>`; what the cache logs comes in between.
"""

import errno
import logging
import os
import signal
import sys
import threading
from pathlib import Path

from nemo_kto.data.reading.sources import Source
from nemo_kto.data.tokens import cache as token_cache
from nemo_kto.data.tokens import content_memo
from nemo_kto.data.tokens.cache import TokenCache
from nemo_kto.data.tokens.rendering import TokenizationSettings
from nemo_kto.data.tokens.tokenization import Encoder
from tests.data.conftest import train_byte_level

CALLS: list[int] = []


class Held(Encoder):
    def encode(self, records):
        CALLS.append(1)
        if len(CALLS) == 1:
            print("encoding", os.getpid(), flush=True)
            sys.stdin.readline()
        return super().encode(records)


class Endless(Encoder):
    def encode(self, records):
        print("encoding", os.getpid(), flush=True)
        threading.Event().wait()


class Killed(Encoder):
    def encode(self, records):
        os.kill(os.getpid(), signal.SIGKILL)


def refuse_lock(*arguments):
    raise OSError(errno.ENOSYS, "Function not implemented")


def main(file, folder, kind, workers, locks):
    token_cache._ROWS, token_cache._FEW = 1024, 2
    if locks == "0":
        content_memo.fcntl.flock = refuse_lock
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    for module in (token_cache, content_memo):
        module.logger.setLevel(logging.INFO)
    encoder = {"held": Held, "endless": Endless}[kind](train_byte_level(), TokenizationSettings())
    print("ready", flush=True)
    sys.stdin.readline()
    store = TokenCache(Path(folder), encoder, workers=int(workers)).tokens_of(Source(file), skip_bad=False)
    print(len(store), len(CALLS), flush=True)


if __name__ == "__main__":
    import cache_process  # under the name by which worker processes find its encoders

    cache_process.main(*sys.argv[1:])
