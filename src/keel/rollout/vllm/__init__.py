"""vLLM as an engine: a server in a process and an environment of its own, which gets every update of the weights."""
