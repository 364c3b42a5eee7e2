"""A source of text as a stream of documents: its files in order, the part asked for, a limit."""

from collections.abc import Iterator

from llama_jax.config.loading import ConfigError
from llama_jax.config.run import TextConfig
from llama_jax.data.files import SourceFile, in_part, list_files
from llama_jax.data.reading import Document, Problem, Read, is_records, read_file


class Corpus:
    """The documents of a source, always in the same order.

    Whole files go to one part, by a hash of their name; in `stdlib` whole top-level modules. A
    source that is one file of records is split by a hash of each text. `max_bytes` ends the stream
    after the document that reaches it.

    Attributes:
      files: those of the part, by name.
      opened: how many of them the last iteration has opened.
      bytes_read: of files, by the last iteration.

    Raises:
      ConfigError: nothing at the path, or one text that would have to be split.
    """

    def __init__(self, config: TextConfig) -> None:
        self._config = config
        files = list_files(config)
        self._by_record = len(files) == 1 and config.part != "all"
        if self._by_record and not is_records(files[0]):
            raise ConfigError(
                f"{config.path} is one text, which can't be split; use part 'all'", key="part"
            )
        self.files: list[SourceFile] = (
            files if self._by_record else [file for file in files if in_part(file.group, config)]
        )
        self.opened = self.bytes_read = 0

    @property
    def expected_bytes(self) -> int:
        """About how many bytes of files an iteration will read."""
        size = sum(file.size for file in self.files)
        return min(size, self._config.max_bytes or size)

    def __iter__(self) -> Read:
        self.opened = self.bytes_read = 0
        limit, taken = self._config.max_bytes, 0
        for item in self._read_all():
            yield item
            if limit is not None and isinstance(item, Document):
                taken += len(item.text.encode())
                if taken >= limit:
                    return

    def _read_all(self) -> Read:
        for file in self.files:
            self.opened += 1
            for item in read_file(file, self._config.text_field, self._count):
                if isinstance(item, Problem) or self._is_wanted(item):
                    yield item

    def _is_wanted(self, document: Document) -> bool:
        return not self._by_record or in_part(document.text, self._config)

    def _count(self, size: int) -> None:
        self.bytes_read += size


def can_split(config: TextConfig) -> bool:
    """Whether a part can be kept aside: of several files, or of one that holds records."""
    files = list_files(config)
    return len(files) > 1 or is_records(files[0])


def texts(config: TextConfig) -> Iterator[str]:
    """The text of every document; problems are passed over, since a build counts them."""
    return (item.text for item in Corpus(config) if isinstance(item, Document))
