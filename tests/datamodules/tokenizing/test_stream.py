"""A stream of tokens that is cut from the front."""

import numpy as np

from datamodules.tokenizing import TokenStream


def test_stream_records_its_position() -> None:
    documents = [np.arange(n, dtype=np.uint16) for n in (3, 1, 5, 2)]
    whole = np.concatenate(documents).tolist()
    ends = np.cumsum([3, 1, 5, 2]).tolist()
    for first in range(12):
        for second in range(13 - first):
            stream = TokenStream(iter(documents))
            assert stream.look_ahead(20) == 11
            assert stream.take(first).tolist() == whole[:first]
            index = sum(end <= first for end in ends)
            offset = first - ([0, *ends][index])
            assert (stream.document, stream.offset) == (index, offset)
            again = TokenStream(iter(documents[index:]), index, offset)
            for each in (stream, again):
                assert each.look_ahead(second) == min(second, 11 - first)
                assert each.take(second).tolist() == whole[first : first + second]
            assert (stream.document, stream.offset) == (again.document, again.offset)
