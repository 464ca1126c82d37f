// The page of one run. Its head, findings and curves are updated here, its responses in dashboard_responses.js.

import { startResponses } from "./dashboard_responses.js";
import { Chart, discard, zoom } from "./dashboard_chart.js";
import { ago, fetched, make, remember, remembered, repeat, verdict } from "./dashboard_common.js";
import { drawFindings, spansByMetric } from "./dashboard_findings.js";

const { run: name } = document.querySelector("main").dataset;
const board = document.getElementById("curves");
const OPEN_GROUPS = 2; // groups of curves that are open at first
const charts = new Map(); // by metric
let spans = new Map(); // metric -> the steps in which findings rest on it
let markedDiagnosis = ""; // the diagnosis from which they were computed
let seen = { version: "", since: -1 };

function drawHead(run) {
  const state = document.getElementById("state");
  const progress = run.step < run.planned ? `step ${run.step} of ${run.planned}` : `${run.step} steps`;
  const parts = [verdict(run.verdict), make("span", `standing ${run.standing}`, run.standing), make("span", "", progress), make("span", "", `last write ${ago(run.heard)}`)];
  if (run.stage !== "unknown") parts.splice(1, 0, make("span", "", run.stage));
  if (run.incomplete.length) parts.push(make("span", "badge-incomplete", "incomplete"));
  state.replaceChildren(...parts);
  const trouble = [run.standing === "finished" ? "" : run.what, ...run.incomplete].filter(Boolean).join("; ");
  const alert = document.getElementById("trouble");
  if (alert.textContent !== trouble) alert.textContent = trouble;
}

function drawGroups(groups) {
  const closed = new Set([...board.querySelectorAll("details:not([open])")].map((details) => details.dataset.title));
  const known = new Set([...board.querySelectorAll("details")].map((details) => details.dataset.title));
  for (const chart of charts.values()) discard(chart);
  charts.clear();
  const sections = groups.map(({ title, curves }, at) => {
    const grid = make("div", "charts");
    for (const curve of curves) {
      const chart = new Chart(curve);
      chart.set(0, curve);
      charts.set(curve.figure, chart);
      grid.append(chart.element);
    }
    const group = make("details", "group", make("summary", "", make("h3", "", title), make("span", "muted small", String(curves.length))), grid);
    group.dataset.title = title;
    group.open = known.has(title) ? !closed.has(title) : at < OPEN_GROUPS;
    return group;
  });
  board.replaceChildren(...(sections.length ? sections : [make("p", "muted", "No metrics yet.")]));
}

function drawCurves(run) {
  if (zoom.steps) return;
  if (run.groups) drawGroups(run.groups);
  for (const { figure, steps, values } of run.points) charts.get(figure)?.add(0, steps, values);
  const diagnosis = JSON.stringify(run.diagnosis);
  if (!run.groups && diagnosis === markedDiagnosis) return;
  markedDiagnosis = diagnosis;
  spans = spansByMetric(run);
  mark();
}

function mark() {
  for (const [figure, chart] of charts) chart.mark(spans.get(figure) ?? []);
}

// ---- zoom

const [from, to] = document.querySelectorAll("#steps input");

async function showSteps(steps) {
  zoom.steps = steps;
  remember({ from: from.value, to: to.value });
  document.getElementById("all-steps").hidden = !steps;
  if (steps) return drawZoomed(steps);
  seen = { version: "", since: -1 }; // request all curves again
  return follow();
}

async function drawZoomed(steps) {
  const curves = await fetched(`/run/${name}/curves.json`, { step_from: steps[0], step_to: steps[1] });
  if (zoom.steps !== steps) return; // the zoom has changed since
  const byMetric = new Map(curves.map((curve) => [curve.figure, curve]));
  for (const [figure, chart] of charts) chart.set(0, byMetric.get(figure) ?? { steps: [], values: [] });
}

function onSteps() {
  const values = [from, to].map((field) => field.valueAsNumber);
  const steps = [values[0] || 0, Number.isNaN(values[1]) ? last : values[1]];
  showSteps(values.every(Number.isNaN) || steps[0] >= steps[1] ? null : steps);
}

[from.value, to.value] = [remembered("from"), remembered("to")];
zoom.change = (steps) => {
  [from.value, to.value] = steps ?? ["", ""];
  showSteps(steps);
};
document.getElementById("steps").addEventListener("change", onSteps);
document.getElementById("all-steps").addEventListener("click", () => zoom.change(null));

// A link to a metric opens its group.
function openGroup() {
  const target = location.hash.startsWith("#figure-") && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  target.closest("details").open = true;
  target.scrollIntoView({ block: "center" });
}

addEventListener("hashchange", openGroup);
document.addEventListener("click", (event) => event.target.closest("a[href^='#']") && setTimeout(openGroup));

let first = true;
let last = 0; // last step of the run
const follow = repeat(async () => {
  const run = await fetched(`/run/${name}/state.json`, seen);
  last = run.step;
  drawHead(run);
  drawCurves(run);
  drawFindings(document.getElementById("findings"), run);
  seen = { version: run.version, since: run.step };
  if (first) openGroup();
  if (first && (from.value || to.value)) onSteps();
  first = false;
  if (!run.known) return 0.2;
  return run.standing === "running" ? 1.5 : 4;
});
startResponses(name);
