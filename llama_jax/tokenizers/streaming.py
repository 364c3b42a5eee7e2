"""Text of ids as it becomes valid: what `decode` of every tokenizer and streaming share.

A character may be spread over several tokens, and the SentencePiece kinds drop the first space of
a text, so a token alone has no text of its own. Each step costs the token's bytes, no more.
"""

import codecs
from collections.abc import Iterable

from llama_jax.tokenizers.tokenizer import Tokenizer, check_ids

_EACH_BYTE = "llama_jax.each_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _replace_each_byte)


class StreamDecoder:
    """Ids in, text out, each character as soon as its last byte is there.

    The pieces joined are the end of `tokenizer.decode([*prompt_ids, *ids])` that follows the text
    of the prompt; a character that begins in the prompt belongs to what is pushed.

    Args:
      tokenizer: whose ids are pushed.
      prompt_ids: what precedes them; its text is not given out.
      skip_special: leave special tokens out instead of spelling them.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Iterable[int] = (), *, skip_special: bool = False
    ) -> None:
        self._spelling, self._skip_special = tokenizer.spelling, skip_special
        errors = _EACH_BYTE if self._spelling.broken == "each_byte" else "replace"
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)
        self._at_start = self._spelling.leading != "kept"
        for token_id in prompt_ids:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """The text that became valid; empty inside a character.

        Raises:
          TokenizerError: an id outside the vocabulary.
        """
        if token_id in self._spelling.special:
            # A special token ends a character that is not whole.
            name = "" if self._skip_special else self._spelling.special[token_id]
            return self.finish() + name
        return self._utf8.decode(self._bytes(token_id))

    def finish(self) -> str:
        """What an unfinished character leaves: U+FFFD, or nothing; more ids may follow."""
        return self._utf8.decode(b"", final=True)

    def _bytes(self, token_id: int) -> bytes:
        pieces = self._spelling.pieces
        if not 0 <= token_id < len(pieces):
            check_ids([token_id], len(pieces))
        piece = pieces[token_id]
        if self._at_start:
            dropped = token_id not in self._spelling.bytes_as_such and piece.startswith(b" ")
            piece = piece[1:] if dropped else piece
            self._at_start = self._spelling.leading == "all" and not piece
        return piece


def decode_all(tokenizer: Tokenizer, ids: Iterable[int], *, skip_special: bool) -> str:
    """The text of `ids`, by a `StreamDecoder`.

    Raises:
      TokenizerError: an id outside the vocabulary.
    """
    stream = StreamDecoder(tokenizer, skip_special=skip_special)
    return "".join([*map(stream.push, ids), stream.finish()])
