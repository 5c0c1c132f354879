"""The same conversations are the same records, whatever format and kind of file they come in.

What is written is in `writings.py`; what is expected is the conversations themselves.
"""

import pytest

from nemo_kto.data.reading.chunks import parse_chunk, read_chunks
from nemo_kto.data.reading.row_reader import RowReader
from nemo_kto.data.reading.sources import Source
from tests.data.writings import CASES, CONTAINERS, CONVERSATIONS, WRITINGS, assistant, in_order_of, is_plain


def read(path, reader):
    chunks = read_chunks(Source(str(path), reader=reader), 7)
    return [(r.prompt, r.response, r.desirable) for chunk in chunks for r in parse_chunk(chunk)]


def expected(conversations):
    return [
        (c.messages, [assistant(text)], good) for c in conversations for text, good in ((c.good, True), (c.bad, False))
    ]


@pytest.mark.parametrize(("name", "container"), CASES)
def test_the_same_records(name, container, tmp_path):
    writing = WRITINGS[name]
    conversations = [c for c in CONVERSATIONS if writing.fits(c)]
    CONTAINERS[container](writing.write(conversations), tmp_path / container)
    found = read(tmp_path / container, RowReader(**writing.reader, chat=True))
    assert found == in_order_of(writing, expected(conversations))


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", [name for name, writing in WRITINGS.items() if writing.fits is is_plain])
def test_strings_stay_strings_in_every_kind_of_file(name, container, tmp_path):
    writing = WRITINGS[name]
    conversations = [c for c in CONVERSATIONS if is_plain(c)]
    CONTAINERS[container](writing.write(conversations), tmp_path / container)
    strings = [(p[0]["content"], r[0]["content"], good) for p, r, good in expected(conversations)]
    assert read(tmp_path / container, RowReader(**writing.reader)) == strings
