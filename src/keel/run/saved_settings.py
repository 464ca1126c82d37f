"""Settings as a run saved them, read as data: the file may have been written by anybody."""

from typing import Any

import yaml

LARGEST = 2_000_000  # bytes of a file of settings
DEEPEST = 40  # lists and mappings in one another


class _PlainLoader(yaml.SafeLoader):
    """Reads what keel writes: no aliases, by which a few lines become gigabytes, and no nesting without end."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias, which keel does not write")
        if self.depth >= DEEPEST:
            raise yaml.YAMLError(f"nested deeper than {DEEPEST}")
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def load_settings(text: bytes) -> Any:
    """Parse the text of a config.yaml. Raises yaml.YAMLError, ValueError, or what a value of another type raises."""
    if len(text) > LARGEST:
        raise ValueError(f"{len(text)} bytes of settings")
    return yaml.load(text.decode(), Loader=_PlainLoader)
