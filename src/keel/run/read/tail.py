"""Read a file of lines that a run appends to, and truncates when it is resumed."""

import os
from collections.abc import Iterator
from pathlib import Path

from keel.files import open_regular

BLOCK = 4_000_000  # bytes read at once
TAIL = 1_000  # last bytes that were read, which show whether the file was truncated since


class GrowingFile:
    """The part of a file that has been read. A last line without a line end is incomplete or still being written."""

    def __init__(self, path: str | Path, start: int = 0) -> None:
        self.path = Path(path)
        self.end = start  # everything up to this byte has been read
        self.size = start  # of the file, at the last read
        self._tail = b""

    @property
    def is_torn(self) -> bool:
        """Whether the file ends in the middle of a line."""
        return self.size > self.end

    def was_cut(self) -> bool:
        """Whether the data that was read is gone: the run was resumed from an earlier step, or started again."""
        try:
            with open_regular(self.path) as file:
                file.seek(self.end - len(self._tail))
                return file.read(len(self._tail)) != self._tail
        except FileNotFoundError:
            return self.end > 0

    def blocks(self) -> Iterator[tuple[int, bytes]]:
        """Yield (first byte, complete lines) of the data that was added since the last call.

        A block counts as read when the next one is requested. Raises OSError if the file exists and cannot be read.
        """
        try:
            file = open_regular(self.path)
        except FileNotFoundError:
            return
        with file:
            self.size = os.fstat(file.fileno()).st_size
            wanted = BLOCK
            while self.end < self.size:
                file.seek(self.end)
                data = file.read(min(wanted, self.size - self.end))
                length = data.rfind(b"\n") + 1
                if not length:
                    if len(data) < wanted:  # an incomplete last line, or the file was truncated after its size was read
                        return
                    wanted *= 2  # a line longer than a block
                    continue
                yield self.end, data[:length]
                self.end += length
                self._tail = (self._tail + data[max(0, length - TAIL) : length])[-TAIL:]
                wanted = BLOCK
