"""The report: one page that holds everything it needs, about one run or comparing several."""

import base64
import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from keel.diagnosis.doctor import diagnose
from keel.diagnosis.findings import Diagnosis
from keel.errors import ConfigError
from keel.report.frontier import panels
from keel.report.plots import curve_groups, evidence_plots
from keel.report.responses import SPREAD, compare_responses, distributions, early_and_late_responses, token_rows
from keel.report.reward_report import environment
from keel.report.settings import non_default_settings, reproduction
from keel.report.summary import format_value, run_rows, tiles
from keel.run.folder import RunFolder, storage, write_atomic
from keel.run.read.compare import differences, settings_differences
from keel.run.read.responses import ResponseLog
from keel.run.read.run import Run, read_run

SCRIPTS = (
    ("keel.report", "static/tokens.js"),
    ("keel.report", "static/report.js"),
    ("plotly", "package_data/plotly.min.js"),
)
STYLES = (("keel.report", "static/report.css"), ("keel.report", "static/tokens.css"))


def write_report(
    paths: Sequence[str], output: str | None = None, home: str | None = None
) -> tuple[Path, dict[str, str]]:
    """The page's path, and run folder -> verdict. A run that is named twice counts once.

    Without `output` the page lies in the run's folder; one that compares several lies in `home`, by default the first
    run's folder, under a name of its own.

    Raises ConfigError for a folder that holds no run or an output that is no page's name, CheckpointError for what
    cannot be read or written.
    """
    runs = [read_run(path) for path in {Path(path).resolve(): path for path in paths}.values()]
    target = _target(runs, output, home)
    diagnoses = [diagnose(run) for run in runs]
    text = render_report(runs, diagnoses, _own_report(runs[0], target))
    write_atomic(target, text.encode("utf-8", "replace"))
    return target, {diagnosis.path: diagnosis.verdict for diagnosis in diagnoses}


def render_report(runs: Sequence[Run], diagnoses: Sequence[Diagnosis], own_report: str | None = None) -> str:
    """The HTML of the report; `own_report` is the address of the report that the first run wrote of itself."""
    scripts = [_text(*place) for place in SCRIPTS]
    found = report_sections(runs, diagnoses)
    return (
        environment()
        .get_template("report.html")
        .render(
            **found,
            data=chart_data(found),
            own_report=own_report,
            shown=format_value,
            style="".join(_text(*place) for place in STYLES),
            scripts=scripts,
            policy=content_policy(scripts),
        )
    )


def report_sections(runs: Sequence[Run], diagnoses: Sequence[Diagnosis]) -> dict[str, Any]:
    """All that the page says, by the names that its templates use."""
    names, kept = _names(runs), [_responses(run) for run in runs]
    answering = next((place for place, own in enumerate(kept) if len(own)), 0)  # whose answers are shown
    curves, still = curve_groups(runs, diagnoses)
    reproduced = [reproduction(run) for run in runs]
    around = differences([found["surroundings"] for found in reproduced])
    return {
        "names": names,
        "diagnoses": diagnoses,
        "rows": run_rows(runs, diagnoses),
        "tiles": tiles(runs[0]),
        "evidence": [evidence_plots(run, found) for run, found in zip(runs, diagnoses, strict=True)],
        "curves": curves,
        "still": still,
        "frontier": panels(runs, names),
        "spread": [distributions(own) for own in kept],
        "spread_labels": SPREAD,
        "answering": answering,
        "num_answers": [len(own) for own in kept],
        "samples": early_and_late_responses(kept[answering]),
        "beside": compare_responses(kept),
        "tokens": token_rows(kept[answering]),
        "differences": settings_differences(runs) + [row for row in around if None not in row["values"]],
        "own": non_default_settings(runs[0]),
        "reproduced": reproduced,
    }


def chart_data(found: Mapping[str, Any]) -> dict[str, Any]:
    """Of the sections: what the page's script draws."""
    groups = [group["curves"] for group in found["curves"]]
    return {
        "curves": [[curve["runs"] for curve in curves] for curves in groups],
        "marks": [[curve["marks"] for curve in curves] for curves in groups],
        "tokens": [row["row"] for row in found["tokens"]],
        **{name: found[name] for name in ("names", "frontier", "spread")},
    }


def content_policy(scripts: Sequence[str]) -> str:
    """Nothing is loaded, and only these scripts run: a text that became markup by mistake could still do nothing.

    Plotly writes its styles from its script, hence 'unsafe-inline' for them.
    """
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


@cache
def _text(package: str, path: str) -> str:
    """A file that comes with a package; a page may hold it between tags."""
    return files(package).joinpath(path).read_text(encoding="utf-8")


def _names(runs: Sequence[Run]) -> list[str]:
    """Those of their folders, or where two have the same one, their paths."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def _responses(run: Run) -> ResponseLog:
    responses = ResponseLog(RunFolder(run.path).rollouts)
    with storage(responses.file.path):
        responses.refresh()
    return responses


def _target(runs: Sequence[Run], output: str | None, home: str | None) -> Path:
    """Where the page goes. A run's own report stays: a comparison is another page; so is the page of a run of
    `keel reward`, which writes a report.html of its own."""
    run = runs[0]
    if output is None and len(runs) > 1:
        return Path(home or run.path) / "comparison.html"
    if output is None:
        return run.path / ("run-report.html" if run.stage == "reward" else "report.html")
    if not output.endswith((".html", ".htm")):
        raise ConfigError("this is not the name of a page", where=output, fix="name a file that ends in .html")
    return Path(output)


def _own_report(run: Run, target: Path) -> str | None:
    """The address, from the page, of what `keel reward` wrote of its run."""
    own = run.path / "report.html"
    if run.stage != "reward" or not own.is_file():
        return None
    return quote(Path(os.path.relpath(own.resolve(), target.resolve().parent)).as_posix())
