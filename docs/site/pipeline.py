"""Draw docs/images/pipeline.svg: the stages of keel and what passes between them. Run: python docs/site/pipeline.py"""

from pathlib import Path

WIDTH, HEIGHT = 820, 356
BOX_WIDTH, BOX_HEIGHT = 168, 62
COLUMNS, ROWS = (20, 224, 428, 632), (20, 138, 256)
STAGES = [  # column, row, command, input, output
    (0, 0, "keel sft", "dialogues", "model"),
    (1, 0, "keel sample", "prompts", "responses"),
    (2, 0, "keel rank", "responses", "rankings"),
    (3, 0, "keel reward", "rankings", "reward model"),
    (2, 1, "keel dpo", "rankings", "policy"),
    (3, 1, "keel train", "scorers", "policy"),
]
ARROWS = [((0, 0), (1, 0)), ((1, 0), (2, 0)), ((2, 0), (3, 0)), ((2, 0), (2, 1)), ((3, 0), (3, 1))]
STYLE = (
    "text{font-family:system-ui,sans-serif;font-size:12.5px;fill:#1f2937}"
    ".command{font-family:ui-monospace,monospace;font-size:15px;font-weight:700}"
    ".stage{fill:#eef2ff;stroke:#3f51b5}.check{fill:#ecfdf5;stroke:#047857}"
    ".arrow{stroke:#374151;stroke-width:1.6;fill:none;marker-end:url(#head)}"
)
HEAD = (
    '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    '<path d="M0 0L8 4L0 8z" fill="#374151"/></marker>'
)


def box(x: int, y: int, width: int, kind: str, command: str, line: str) -> str:
    """Return the SVG of a rectangle with a command and a line of text."""
    middle = x + width // 2
    return (
        f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{BOX_HEIGHT}" rx="6"/>'
        f'<text class="command" x="{middle}" y="{y + 26}" text-anchor="middle">{command}</text>'
        f'<text x="{middle}" y="{y + 47}" text-anchor="middle">{line}</text>'
    )


def arrow(start: tuple[int, int], end: tuple[int, int]) -> str:
    """Return the SVG of an arrow to the box on the right, or to the box below."""
    (column, row), x, y = start, COLUMNS[start[0]], ROWS[start[1]]
    if row == end[1]:
        level = y + BOX_HEIGHT // 2
        return f'<path class="arrow" d="M{x + BOX_WIDTH} {level}H{COLUMNS[column + 1] - 2}"/>'
    middle = x + BOX_WIDTH // 2
    return f'<path class="arrow" d="M{middle} {y + BOX_HEIGHT}V{ROWS[row + 1] - 2}"/>'


def picture() -> str:
    """Return the picture as SVG."""
    parts = [box(COLUMNS[c], ROWS[r], BOX_WIDTH, "stage", command, f"{a} → {b}") for c, r, command, a, b in STAGES]
    two = COLUMNS[1] + BOX_WIDTH - COLUMNS[0]
    parts.append(box(COLUMNS[2], ROWS[2], two, "check", "keel evaluate", "policies → metrics with intervals, gate"))
    parts.append(
        box(COLUMNS[0], ROWS[1], two, "check", "keel data check, keel plan", "before a run: data, memory, time")
    )
    parts.append(
        box(COLUMNS[0], ROWS[2], two, "check", "keel doctor, report, serve", "run folder → findings and what to change")
    )
    parts += [arrow(start, end) for start, end in [*ARROWS, ((2, 1), (2, 2)), ((3, 1), (3, 2))]]
    size = f'width="{WIDTH}" height="{HEIGHT - 18}" viewBox="0 0 {WIDTH} {HEIGHT - 18}"'
    title = "<title>The stages of keel and what passes between them</title>"
    back = f'<rect width="{WIDTH}" height="{HEIGHT - 18}" fill="#ffffff"/>'
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">{title}<style>{STYLE}</style>'
        f"<defs>{HEAD}</defs>\n{back}\n{body}\n</svg>\n"
    )


if __name__ == "__main__":
    (Path(__file__).parents[1] / "images" / "pipeline.svg").write_text(picture(), encoding="utf-8")
