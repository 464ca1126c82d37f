"""The report of one run, or a comparison of several, as one self-contained HTML page."""

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
from keel.report.reward_report import template_environment
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
    """Diagnose runs and write their report.

    Args:
        paths: Run folders. One that is named twice counts once.
        output: File of the page. By default `report.html` in the run's folder.
        home: Folder of a comparison without `output`. By default the first run's folder.

    Returns:
        The path of the page, and run folder -> verdict.

    Raises:
        ConfigError: A folder holds no run, or `output` is not the name of an HTML file.
        CheckpointError: A file cannot be read or written.
    """
    runs = [read_run(path) for path in {Path(path).resolve(): path for path in paths}.values()]
    target = _target(runs, output, home)
    diagnoses = [diagnose(run) for run in runs]
    text = render_report(runs, diagnoses, _reward_report_address(runs[0], target))
    write_atomic(target, text.encode("utf-8", "replace"))
    return target, {diagnosis.path: diagnosis.verdict for diagnosis in diagnoses}


def render_report(runs: Sequence[Run], diagnoses: Sequence[Diagnosis], own_report: str | None = None) -> str:
    """Render the HTML. `own_report` is the address of the report that `keel reward` wrote of the first run."""
    scripts = [_read_asset(*asset) for asset in SCRIPTS]
    sections = report_sections(runs, diagnoses)
    return (
        template_environment()
        .get_template("report.html")
        .render(
            **sections,
            data=chart_data(sections),
            own_report=own_report,
            shown=format_value,
            style="".join(_read_asset(*asset) for asset in STYLES),
            scripts=scripts,
            policy=content_policy(scripts),
        )
    )


def report_sections(runs: Sequence[Run], diagnoses: Sequence[Diagnosis]) -> dict[str, Any]:
    """Compute the content of the page, by the names that its templates use."""
    names, logs = _names(runs), [_read_responses(run) for run in runs]
    example_run = next((index for index, log in enumerate(logs) if len(log)), 0)  # whose responses are shown
    curves, constant = curve_groups(runs, diagnoses)
    reproductions = [reproduction(run) for run in runs]
    surroundings = differences([each["surroundings"] for each in reproductions])
    return {
        "names": names,
        "diagnoses": diagnoses,
        "rows": run_rows(runs, diagnoses),
        "tiles": tiles(runs[0]),
        "evidence": [evidence_plots(run, diagnosis) for run, diagnosis in zip(runs, diagnoses, strict=True)],
        "curves": curves,
        "constant": constant,
        "frontier": panels(runs, names),
        "spread": [distributions(log) for log in logs],
        "spread_labels": SPREAD,
        "example_run": example_run,
        "num_responses": [len(log) for log in logs],
        "samples": early_and_late_responses(logs[example_run]),
        "shared_prompts": compare_responses(logs),
        "tokens": token_rows(logs[example_run]),
        "differences": settings_differences(runs) + [row for row in surroundings if None not in row["values"]],
        "non_default": non_default_settings(runs[0]),
        "reproductions": reproductions,
    }


def chart_data(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Select from the sections what the page's script draws."""
    groups = [group["curves"] for group in sections["curves"]]
    return {
        "curves": [[curve["runs"] for curve in curves] for curves in groups],
        "marks": [[curve["marks"] for curve in curves] for curves in groups],
        "tokens": [row["row"] for row in sections["tokens"]],
        **{name: sections[name] for name in ("names", "frontier", "spread")},
    }


def content_policy(scripts: Sequence[str]) -> str:
    """Return the Content-Security-Policy of the page: nothing is loaded, and only these scripts run.

    Text that became markup by mistake would therefore have no effect. Styles need 'unsafe-inline', because Plotly
    writes them from its script.
    """
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


@cache
def _read_asset(package: str, path: str) -> str:
    return files(package).joinpath(path).read_text(encoding="utf-8")


def _names(runs: Sequence[Run]) -> list[str]:
    """Return the folder names of the runs, or their paths if two names are the same."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def _read_responses(run: Run) -> ResponseLog:
    responses = ResponseLog(RunFolder(run.path).rollouts)
    with storage(responses.file.path):
        responses.refresh()
    return responses


def _target(runs: Sequence[Run], output: str | None, home: str | None) -> Path:
    """Return the file of the page, such that it does not replace another report.

    A comparison has a different name than a run's report, and so has the report of a run of `keel reward`, which
    writes a report.html itself.
    """
    run = runs[0]
    if output is None and len(runs) > 1:
        return Path(home or run.path) / "comparison.html"
    if output is None:
        return run.path / ("run-report.html" if run.stage == "reward" else "report.html")
    if not output.endswith((".html", ".htm")):
        raise ConfigError("not the name of an HTML file", where=output, fix="name a file that ends in .html")
    return Path(output)


def _reward_report_address(run: Run, target: Path) -> str | None:
    """Return the address of the report by `keel reward`, relative to the page."""
    report = run.path / "report.html"
    if run.stage != "reward" or not report.is_file():
        return None
    return quote(Path(os.path.relpath(report.resolve(), target.resolve().parent)).as_posix())
