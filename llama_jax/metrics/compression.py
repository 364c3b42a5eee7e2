"""Bits a byte: of a model from its loss, and of gzip and xz to set beside it.

The compressors get the held-out documents joined into one stream, in order, which is kinder to
them than file by file: gzip then sees 32 KiB back across documents, xz all of them. The model sees
no more than its own row of `seq_len` tokens.
"""

import gzip
import lzma
import math
from collections.abc import Iterable


def bits_per_byte(loss_per_token: float, tokens: float, text_bytes: float) -> float:
    """Bits a byte of text that is coded at `loss_per_token` nats in `tokens` predicted tokens."""
    return loss_per_token * tokens / (math.log(2) * text_bytes)


def compressed_bits_per_byte(texts: Iterable[str]) -> dict[str, float]:
    """Bits a byte of `gzip -9` and `xz -9` on the UTF-8 of all texts joined."""
    data = "".join(texts).encode()
    if not data:
        raise ValueError("no held-out text to compress")
    sizes = {
        # What `gzip -9` and `xz -9` write, less a file name in the header.
        "gzip -9": len(gzip.compress(data, compresslevel=9)),
        "xz -9": len(lzma.compress(data, preset=9)),
    }
    return {name: 8 * size / len(data) for name, size in sizes.items()}
