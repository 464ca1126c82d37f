"""A file of lines that a run appends to while somebody reads it, and cuts back when it is resumed."""

import os
from collections.abc import Iterator
from pathlib import Path

from keel.files import open_regular

BLOCK = 4_000_000  # bytes read at once
TAIL = 1_000  # bytes by which the end of what was read is known again


class GrowingFile:
    """What has been read of a file, up to a byte. A last line without its end is torn, or still being written."""

    def __init__(self, path: str | Path, start: int = 0) -> None:
        self.path = Path(path)
        self.end = start  # all before this byte has been read
        self.size = start  # of the file, when it was looked at last
        self._tail = b""

    @property
    def is_torn(self) -> bool:
        """Whether the file ends in the middle of a line."""
        return self.size > self.end

    def was_cut(self) -> bool:
        """Whether what was read is no longer there: the run was resumed from an earlier step, or begun anew."""
        try:
            with open_regular(self.path) as file:
                file.seek(self.end - len(self._tail))
                return file.read(len(self._tail)) != self._tail
        except FileNotFoundError:
            return self.end > 0

    def blocks(self) -> Iterator[tuple[int, bytes]]:
        """What was added since the last call: (first byte, whole lines). Each block counts as read when asked on.

        Raises OSError when the file is there and cannot be read.
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
                whole = data.rfind(b"\n") + 1
                if not whole and self.end + len(data) >= self.size:
                    return
                if not whole:  # a line longer than a block
                    wanted *= 2
                    continue
                yield self.end, data[:whole]
                self.end += whole
                self._tail = (self._tail + data[max(0, whole - TAIL) : whole])[-TAIL:]
                wanted = BLOCK
