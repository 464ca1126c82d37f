// The doctor's findings, each with its evidence, likely causes and suggested changes.

import { make, verdict } from "./dashboard_common.js";

const reasons = (title, texts) => (texts.length ? [make("p", "reasons", make("b", "", title), ` ${texts.join("; ")}`)] : []);

function change({ setting, to }) {
  const line = make("p", "change", make("b", "", "Try "));
  line.append(...(setting ? [make("code", "", setting), ": "] : []), to);
  return line;
}

function cause(each) {
  return make("li", "", make("p", "", each.what), ...reasons("For:", each.speaks_for), ...reasons("Against:", each.speaks_against), change(each.change));
}

function evidence({ figure, says }) {
  const name = make("a", "evidence-figure", figure);
  name.href = `#figure-${figure}`;
  return make("li", "", name, ` ${says}`);
}

function when(finding) {
  if (finding.last_step === null) return `since step ${finding.first_step}`;
  return `steps ${finding.first_step} to ${finding.last_step}, no longer open`;
}

function card(finding, open) {
  const summary = make("summary", "", verdict(finding.severity), make("span", "finding-title", finding.title), make("span", "muted small", `${finding.name}, ${when(finding)}`));
  const details = make("details", `card finding-card ${finding.last_step === null ? "" : "over"}`, summary);
  details.dataset.name = finding.name;
  details.open = open;
  const follows = finding.follows_from ? [make("p", "small muted", `Follows from ${finding.follows_from}.`)] : [];
  details.append(...follows, make("ul", "evidence", ...finding.evidence.map(evidence)));
  if (finding.causes.length) details.append(make("h3", "", "Likely causes, most likely first"), make("ol", "causes", ...finding.causes.map(cause)));
  return details;
}

let shown = "";

export function drawFindings(element, run) {
  const key = JSON.stringify([run.diagnosis, run.verdict]);
  if (key === shown) return;
  shown = key;
  const previous = [...element.querySelectorAll("details")];
  const open = new Set(previous.filter((details) => details.open).map((details) => details.dataset.name));
  if (!previous.length && run.diagnosis[0]?.last_step === null) open.add(run.diagnosis[0].name); // the main finding
  const cards = run.diagnosis.map((finding) => card(finding, open.has(finding.name)));
  const healthy = run.verdict === "healthy" ? "No problems found." : "No diagnosis before the first step.";
  element.replaceChildren(...(cards.length ? cards : [make("p", "muted", healthy)]));
}

// Return metric -> the spans of steps in which findings rest on it.
export function spansByMetric(run) {
  const spans = new Map();
  for (const { evidence, severity, first_step: from, last_step: to } of run.diagnosis) {
    for (const { figure } of evidence) spans.set(figure, [...(spans.get(figure) ?? []), { from, to, severity }]);
  }
  return spans;
}
