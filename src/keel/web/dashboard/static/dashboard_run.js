// The page of one run: its head, findings and curves follow the run; the answers are a module of their own.

import { startAnswers } from "./dashboard_responses.js";
import { Chart, forget, zoom } from "./dashboard_chart.js";
import { ago, fetched, make, remember, remembered, repeat, verdict } from "./dashboard_common.js";
import { drawFindings, spansOf } from "./dashboard_findings.js";

const { run: name } = document.querySelector("main").dataset;
const board = document.getElementById("curves");
const OPEN = 2; // groups of curves that are open at first
const charts = new Map(); // by figure
let spans = new Map(); // by figure: where findings speak of it
let told = ""; // the findings that they are of
let seen = { version: "", since: -1 };

function drawHead(run) {
  const state = document.getElementById("state");
  const progress = run.step < run.planned ? `step ${run.step} of ${run.planned}` : `${run.step} steps`;
  const parts = [verdict(run.verdict), make("span", `standing ${run.standing}`, run.standing), make("span", "", progress), make("span", "", `heard ${ago(run.heard)}`)];
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
  for (const chart of charts.values()) forget(chart);
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
    group.open = known.has(title) ? !closed.has(title) : at < OPEN;
    return group;
  });
  board.replaceChildren(...(sections.length ? sections : [make("p", "muted", "No figures yet.")]));
}

function drawCurves(run) {
  if (zoom.steps) return;
  if (run.groups) drawGroups(run.groups);
  for (const { figure, steps, values } of run.points) charts.get(figure)?.add(0, steps, values);
  const says = JSON.stringify(run.diagnosis);
  if (!run.groups && says === told) return;
  told = says;
  spans = spansOf(run);
  mark();
}

function mark() {
  for (const [figure, chart] of charts) chart.mark(spans.get(figure) ?? []);
}

// ---- some steps only

const [from, to] = document.querySelectorAll("#steps input");

async function showSteps(steps) {
  zoom.steps = steps;
  remember({ from: from.value, to: to.value });
  document.getElementById("all-steps").hidden = !steps;
  if (steps) return drawClosely(steps);
  seen = { version: "", since: -1 }; // all of the curves again
  return follow();
}

async function drawClosely(steps) {
  const curves = await fetched(`/run/${name}/curves.json`, { step_from: steps[0], step_to: steps[1] });
  if (zoom.steps !== steps) return; // somebody has asked for others since
  const found = new Map(curves.map((curve) => [curve.figure, curve]));
  for (const [figure, chart] of charts) chart.set(0, found.get(figure) ?? { steps: [], values: [] });
}

function onSteps() {
  const given = [from, to].map((field) => field.valueAsNumber);
  const steps = [given[0] || 0, Number.isNaN(given[1]) ? last : given[1]];
  showSteps(given.every(Number.isNaN) || steps[0] >= steps[1] ? null : steps);
}

[from.value, to.value] = [remembered("from"), remembered("to")];
zoom.change = (steps) => {
  [from.value, to.value] = steps ?? ["", ""];
  showSteps(steps);
};
document.getElementById("steps").addEventListener("change", onSteps);
document.getElementById("all-steps").addEventListener("click", () => zoom.change(null));

// A link to a figure opens the group that it is in.
function openGroup() {
  const target = location.hash.startsWith("#figure-") && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  target.closest("details").open = true;
  target.scrollIntoView({ block: "center" });
}

addEventListener("hashchange", openGroup);
document.addEventListener("click", (event) => event.target.closest("a[href^='#']") && setTimeout(openGroup));

let first = true;
let last = 0; // step of the run
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
startAnswers(name);
