"""Read the settings that a run saved. The file is not trusted: anybody may have written it."""

from typing import Any

import yaml

LARGEST = 2_000_000  # bytes
DEEPEST = 40  # nesting of lists and mappings


class _PlainLoader(yaml.SafeLoader):
    """Reads what keel writes: without aliases, which can expand a few lines to gigabytes, and without deep nesting."""

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
    """Parse the text of a config.yaml. Raises yaml.YAMLError or ValueError, or an error of a YAML value constructor."""
    if len(text) > LARGEST:
        raise ValueError(f"{len(text)} bytes of settings")
    return yaml.load(text.decode(), Loader=_PlainLoader)
