// Comparison of two runs: curves in one chart, settings that differ, and responses to the same prompts.

import { scoreTiles, text, tokenView } from "./dashboard_response.js";
import { Chart, discard } from "./dashboard_chart.js";
import { ago, debounced, count, fetched, make, number, remember, remembered, repeat, verdict } from "./dashboard_common.js";
import { List } from "./dashboard_list.js";

const { of, with: other } = document.querySelector("main").dataset;
const both = { of, with: other };
const names = [...document.querySelectorAll(".side a")].map((link) => link.textContent);
const board = document.getElementById("curves");
const form = document.getElementById("filters");
const shared = document.getElementById("shared");

// ---- curves

const charts = new Map(); // by metric
const seen = [of, other].map(() => ({ version: "", since: -1 }));
const groups = [null, null];
const curves = [new Map(), new Map()]; // metric -> curve, for each run

// Return title -> metric -> curve of either run.
function curvesByTitle() {
  const byTitle = new Map();
  for (const { title, curves: grouped } of groups.flat()) {
    if (!byTitle.has(title)) byTitle.set(title, new Map());
    for (const curve of grouped) byTitle.get(title).set(curve.figure, curve);
  }
  return byTitle;
}

function drawGroups() {
  const closed = new Set([...board.querySelectorAll("details:not([open])")].map((details) => details.dataset.title));
  const first = !board.querySelector("details");
  for (const chart of charts.values()) discard(chart);
  charts.clear();
  const sections = [...curvesByTitle()].map(([title, grouped], at) => {
    const grid = make("div", "charts");
    for (const [metric, curve] of grouped) {
      const chart = new Chart(curve, names);
      curves.forEach((ofRun, place) => ofRun.has(metric) && chart.set(place, ofRun.get(metric)));
      charts.set(metric, chart);
      grid.append(chart.element);
    }
    const group = make("details", "group", make("summary", "", make("h3", "", title), make("span", "muted small", String(grouped.size))), grid);
    group.dataset.title = title;
    group.open = first ? at < 1 : !closed.has(title);
    return group;
  });
  board.replaceChildren(...sections);
}

async function followRun(place) {
  const path = `/run/${[of, other][place]}`;
  const run = await fetched(`${path}/state.json`, seen[place]);
  const state = [verdict(run.verdict), ` ${run.standing}, step ${run.step} of ${run.planned}, last write ${ago(run.heard)}`];
  document.getElementById(`state-${place}`).replaceChildren(...state);
  if (run.groups) {
    groups[place] = run.groups;
    curves[place] = new Map((await fetched(`${path}/curves.json`)).map((curve) => [curve.figure, curve]));
    if (groups.every(Boolean)) drawGroups();
  }
  for (const { figure, steps, values } of run.points) {
    charts.get(figure)?.add(place, steps, values);
    const curve = curves[place].get(figure);
    if (curve && steps[0] > curve.steps.at(-1)) {
      curve.steps.push(...steps);
      curve.values.push(...values);
    }
  }
  seen[place] = { version: run.version, since: run.step };
  return run;
}

// ---- settings

function drawSettings(rows) {
  const body = rows.map(({ name, values }) =>
    make("tr", "", make("th", "", make("code", "", name)), ...values.map((value) => make("td", "", make("code", "", value === null ? "–" : typeof value === "string" ? value : JSON.stringify(value))))),
  );
  const head = make("thead", "", make("tr", "", make("th", "", "Setting"), ...names.map((name) => make("th", "", name))));
  const table = make("div", "wide", make("table", "settings", head, make("tbody", "", ...body)));
  document.getElementById("settings").replaceChildren(rows.length ? table : make("p", "muted", "None, except for the output folders."));
}

// ---- the same prompts

const ROW = 52;
let by = remembered("by") ?? "newest";
let listed = ""; // the query whose rows are in the list
const search = form.elements.text;
const query = () => ({ ...both, by, text: search.value });

function fill(element, row) {
  const [one, two] = row.means;
  const gain = one === null || two === null ? null : two - one;
  const metrics = [["first", number(one)], ["second", number(two)], ["gain", (gain > 0 ? "+" : "") + number(gain)], ["responses", row.counts.join(" + ")]];
  element.replaceChildren(
    make("span", "item-text", make("span", "item-response", row.prompt)),
    ...metrics.map(([name, value]) => make("span", `item-figure item-${name}`, make("span", "unit muted", name), value)),
  );
}

const list = new List(document.getElementById("list"), ROW, {
  load: (offset) => fetched("/compare/prompts.json", { ...query(), offset }),
  fill,
  open: async (row, opens) => {
    remember({ at: row.at, there: row.there }, opens);
    await showPair();
    if (opens) document.getElementById("both").scrollIntoView({ block: "nearest" });
  },
});

async function refreshPrompts() {
  const values = query();
  const key = JSON.stringify(values);
  const page = await fetched("/compare/prompts.json", values);
  shared.hidden = page.total === 0;
  if (key !== listed || page.matched !== list.total) list.show(page, key === listed);
  listed = key;
  const parts = [page.matched === page.total ? `${count(page.total)} prompts` : `${count(page.matched)} of ${count(page.total)} prompts`];
  if (page.read < 1) parts.push(`from the newest responses; ${Math.floor(100 * page.read)}% of the file read`);
  document.getElementById("matched").textContent = parts.join(", ");
  for (const button of document.querySelectorAll("#list-head button")) button.setAttribute("aria-pressed", button.dataset.sort === by);
  return page.read < 1 ? 0.2 : 5;
}

// ---- two responses to one prompt

function markDifferences(differences, shownKind, row) {
  if (!differences.length) return text(String(row.response));
  const parts = differences.filter(([kind]) => kind === "same" || kind === shownKind).map(([kind, part]) => (kind === "same" ? part : make("mark", kind, part)));
  const element = text("");
  element.replaceChildren(...parts);
  return element;
}

function side(pair, place) {
  const name = ["at", "there"][place];
  const select = make("select");
  select.setAttribute("aria-label", `Response of ${names[place]}`);
  for (const { at, step, score } of pair.choices[place]) {
    const option = make("option", "", `step ${step}, score ${number(score)}`);
    option.value = at;
    select.append(option);
  }
  select.value = remembered(name);
  select.addEventListener("change", () => {
    remember({ [name]: select.value }, true);
    showPair();
  });
  const head = make("div", `side ${place ? "second" : "first"}`, make("bdi", "", names[place]));
  const row = pair.rows[place];
  return make("div", "", head, select, markDifferences(pair.differences, place ? "added" : "removed", row), scoreTiles(row), tokenView(row));
}

async function showPair() {
  const [at, there] = [remembered("at"), remembered("there")];
  const element = document.getElementById("pair");
  if (at === null || there === null) {
    element.hidden = true;
    element.parentElement.classList.remove("split");
    return;
  }
  const pair = await fetched("/compare/answers.json", { ...both, at, there });
  if (at !== remembered("at") || there !== remembered("there")) return;
  element.replaceChildren(text(pair.prompts[0], "prompt-text"), make("div", "pair", side(pair, 0), side(pair, 1)));
  element.hidden = false;
  element.parentElement.classList.add("split");
}

// ---- wiring

search.value = remembered("text") ?? "";
repeat(async () => {
  const runs = [await followRun(0), await followRun(1)];
  if (!runs.every((run) => run.known)) return 0.2;
  return runs.some((run) => run.standing === "running") ? 2 : 5;
});
const refreshNow = repeat(refreshPrompts);
const later = debounced(refreshNow, 250);
form.addEventListener("submit", (event) => event.preventDefault());
search.addEventListener("input", () => {
  remember({ text: search.value });
  later();
});
document.getElementById("list-head").addEventListener("click", (event) => {
  if (!event.target.dataset.sort) return;
  by = event.target.dataset.sort;
  remember({ by });
  refreshNow();
});
document.getElementById("download").addEventListener("click", (event) => {
  event.currentTarget.href = `/compare/disputed.jsonl?${new URLSearchParams({ ...both, most: document.getElementById("most").value })}`;
});
addEventListener("popstate", showPair);
fetched("/compare/settings.json", both).then(drawSettings);
showPair();
