"""docs/reference/python.md: the public functions and classes of `keel`, and its errors."""

import ast
from collections.abc import Iterator

import keel

from .markdown import anchor, escape, table
from .source import Function, class_markdown, function_markdown, public

INTRODUCTION = """
# Python API

Each command is a function of `keel`. It takes the settings of the command as a mapping or as a config object of
`keel.config`; [all settings](settings.md) lists them. `import keel` does not load torch.

```python
import keel

sampled = keel.sample(
    {"model": "runs/quickstart/sft/model", "output": "runs/python/responses.jsonl", "sampling": {"num_responses": 2}},
    prompts=["customer: hello. my radio is broken. agent:"],
)
print(sampled.rows[0]["responses"], sampled.truncated)

for finding in keel.doctor("runs/quickstart/ppo").findings:
    print(finding.severity, finding.name, finding.first_step)
```
"""
TRAINER = """
`keel.PolicyTrainer` is for training loops that you write. [Coming from TRL](../tutorials/trl.md#the-old-step-api) has
an example.
"""
ERRORS = """
Functions raise the classes of `keel.errors`. All but `Interrupted` are a `KeelError`, whose attributes `what`, `where`
and `fix` hold the parts of its message. A command that fails with an error returns its exit code.
"""


def page() -> str:
    """Return the text of the page."""
    api, trainer = public("keel.api"), public("keel.training.trainer")["PolicyTrainer"]
    nodes = {name: node for name, node in api.items() if name in keel.__all__} | {"PolicyTrainer": trainer}
    assert set(nodes) == set(keel.__all__) - {"core"}, "keel has a public name that this page does not show"
    functions = [node for node in nodes.values() if isinstance(node, Function)]
    results = [node for name, node in nodes.items() if isinstance(node, ast.ClassDef) and name != "PolicyTrainer"]
    diagnosis = [node for node in public("keel.diagnosis.findings").values() if isinstance(node, ast.ClassDef)]
    assert isinstance(trainer, ast.ClassDef)
    overview = [[f"[`keel.{node.name}`](#{anchor(f'keel.{node.name}')})", _summary(node)] for node in functions]
    return "\n\n".join(
        [
            INTRODUCTION.strip(),
            table(["function", "what it does"], overview),
            "The formulas are in [keel.core](core.md).",
            "## Functions",
            *(function_markdown(node, "keel.") for node in functions),
            "## Results",
            *(class_markdown(node, "keel.") for node in results),
            "## PolicyTrainer",
            TRAINER.strip(),
            class_markdown(trainer, "keel."),
            "## Diagnosis",
            "What `keel.doctor` returns. The classes are in `keel.diagnosis.findings`.",
            *map(class_markdown, reversed(diagnosis)),
            "## Errors",
            ERRORS.strip(),
            table(["class", "exit code", "meaning"], list(_error_rows())),
        ]
    )


def _summary(node: Function) -> str:
    """Return the first sentence of a docstring."""
    return escape((ast.get_docstring(node) or "").partition("\n\n")[0].replace("\n", " "))


def _error_rows() -> Iterator[list[str]]:
    """Yield name, exit code and meaning of each error. A class without an exit code inherits it."""
    import keel.errors

    for name in public("keel.errors"):
        error = getattr(keel.errors, name)
        yield [f"`{name}`", str(error.exit_code), escape(" ".join((error.__doc__ or "").split()))]
