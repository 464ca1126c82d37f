"""The generators of docs/reference/: discovery, and the Markdown that they write."""

from keel import errors
from keel.cli import main as cli

from .reference import FIRST_LINE, generate_pages
from .reference.commands import verbs
from .reference.markdown import anchor, docstring_markdown, escape, table

DOCSTRING = """Do `a[0]` to *all* of [B, T].

    run = here()

Args:
    first: what is first,
        continued.
    **rest: everything else.

Raises ValueError.
"""


def test_each_module_with_a_page_generates_the_page_of_its_name():
    pages = {path.name: text for path, text in generate_pages().items()}
    assert {"commands.md", "core.md", "metrics.md", "python.md", "settings.md"} <= set(pages)
    assert all(text.startswith(f"{FIRST_LINE}\n\n# ") for text in pages.values())


def test_every_verb_and_every_exit_code_is_in_the_table_of_commands():
    assert [verb.name.split()[0] for verb in verbs()] == list(cli.VERBS)
    classes = [each for each in vars(errors).values() if isinstance(each, type) and hasattr(each, "exit_code")]
    assert {each.exit_code for each in classes} <= set(cli.EXIT_CODES)
    assert cli.BROKEN_PIPE in cli.EXIT_CODES


def test_a_docstring_as_markdown():
    assert docstring_markdown(DOCSTRING).split("\n\n") == [
        r"Do `a[0]` to \*all\* of \[B, T].",
        "```py\nrun = here()\n```",
        "**Args:**",
        "- `first`: what is first, continued.\n- `**rest`: everything else.",
        "Raises ValueError.",
    ]


def test_bars_in_a_table_are_escaped():
    assert table(["a"], [["x | `int | None`"]]).splitlines()[-1] == r"| x \| <code>int &#124; None</code> |"
    assert escape("a*b <c> `d*`") == r"a\*b \<c> `d*`"
    assert anchor("keel sft, keel reward and keel dpo") == "keel-sft-keel-reward-and-keel-dpo"
