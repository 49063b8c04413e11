"""Text files into token shards, by several processes, the same ones on any number of them.

Documents are read in order, encoded in chunks that come back in order, and cut into shards: first
one for validation, then those to train on. A manifest beside the shards says after each of them
where in the input the next one starts, so that a run that was killed can be resumed.

A package because reading, encoding and the job with its manifest are a file each.
"""

from datamodules.tokenizing.documents import SUFFIXES, read_documents
from datamodules.tokenizing.encoding import VAL_TOKENS, TokenStream
from datamodules.tokenizing.job import MANIFEST, UsageError, recorded_tokenizer, tokenize

__all__ = [
    "MANIFEST",
    "SUFFIXES",
    "VAL_TOKENS",
    "TokenStream",
    "UsageError",
    "read_documents",
    "recorded_tokenizer",
    "tokenize",
]
