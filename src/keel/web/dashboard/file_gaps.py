"""Lines of a file that a reader of the dashboard skips."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FileGaps:
    """The lines of a file that hold no data."""

    broken: int = 0  # complete lines
    is_torn: bool = False  # the last line is incomplete

    def notes(self, file: str, is_running: bool) -> list[str]:
        """Describe the gaps. The last line of a running run may be in the middle of a write, and is no gap."""
        notes = []
        if self.is_torn and not is_running:
            notes.append(f"the last line of {file} is incomplete")
        if self.broken:
            notes.append(f"{self.broken} broken line{'s' if self.broken > 1 else ''} in {file} skipped")
        return notes
