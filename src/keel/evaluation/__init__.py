"""Sample from models, score and compare their responses: `keel sample`, `keel evaluate` and `keel drift`."""
