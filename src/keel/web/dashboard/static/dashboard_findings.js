// What the doctor says of a run: each finding with its evidence, its causes and what to change.

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
  return `steps ${finding.first_step} to ${finding.last_step}, over now`;
}

function card(finding, open) {
  const summary = make("summary", "", verdict(finding.severity), make("span", "finding-title", finding.title), make("span", "muted small", `${finding.name}, ${when(finding)}`));
  const details = make("details", `card finding-card ${finding.last_step === null ? "" : "over"}`, summary);
  details.dataset.name = finding.name;
  details.open = open;
  const follows = finding.follows_from ? [make("p", "small muted", `It follows from ${finding.follows_from}.`)] : [];
  details.append(...follows, make("ul", "evidence", ...finding.evidence.map(evidence)));
  if (finding.causes.length) details.append(make("h3", "", "Likely causes, the likeliest first"), make("ol", "causes", ...finding.causes.map(cause)));
  return details;
}

let shown = "";

export function drawFindings(element, run) {
  const says = JSON.stringify([run.diagnosis, run.verdict]);
  if (says === shown) return;
  shown = says;
  const before = [...element.querySelectorAll("details")];
  const open = new Set(before.filter((details) => details.open).map((details) => details.dataset.name));
  if (!before.length && run.diagnosis[0]?.last_step === null) open.add(run.diagnosis[0].name); // the diagnosis itself
  const cards = run.diagnosis.map((finding) => card(finding, open.has(finding.name)));
  const healthy = run.verdict === "healthy" ? "Nothing is wrong that these figures could show." : "Nothing can be said before the first step.";
  element.replaceChildren(...(cards.length ? cards : [make("p", "muted", healthy)]));
}

// Where on a curve a finding speaks of it.
export function spansOf(run) {
  const spans = new Map();
  for (const { evidence, severity, first_step: from, last_step: to } of run.diagnosis) {
    for (const { figure } of evidence) spans.set(figure, [...(spans.get(figure) ?? []), { from, to, severity }]);
  }
  return spans;
}
