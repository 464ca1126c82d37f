// Two runs side by side: curves over each other, settings that differ, and what each answered to the same prompts.

import { scoresOf, text, tokenView } from "./dashboard_response.js";
import { Chart, forget } from "./dashboard_chart.js";
import { ago, calmly, count, fetched, make, number, remember, remembered, repeat, verdict } from "./dashboard_common.js";
import { List } from "./dashboard_list.js";

const { of, with: other } = document.querySelector("main").dataset;
const both = { of, with: other };
const names = [...document.querySelectorAll(".side a")].map((link) => link.textContent);
const board = document.getElementById("curves");
const form = document.getElementById("filters");
const shared = document.getElementById("shared");

// ---- curves

const charts = new Map(); // by figure
const seen = [of, other].map(() => ({ version: "", since: -1 }));
const groups = [null, null];
const figures = [new Map(), new Map()]; // of each run, also those that its own page does not show twice

// title -> figure -> curve of either run
function titled() {
  const found = new Map();
  for (const { title, curves } of groups.flat()) {
    if (!found.has(title)) found.set(title, new Map());
    for (const curve of curves) found.get(title).set(curve.figure, curve);
  }
  return found;
}

function drawGroups() {
  const closed = new Set([...board.querySelectorAll("details:not([open])")].map((details) => details.dataset.title));
  const first = !board.querySelector("details");
  for (const chart of charts.values()) forget(chart);
  charts.clear();
  const sections = [...titled()].map(([title, curves], at) => {
    const grid = make("div", "charts");
    for (const [figure, curve] of curves) {
      const chart = new Chart(curve, names);
      figures.forEach((own, place) => own.has(figure) && chart.set(place, own.get(figure)));
      charts.set(figure, chart);
      grid.append(chart.element);
    }
    const group = make("details", "group", make("summary", "", make("h3", "", title), make("span", "muted small", String(curves.size))), grid);
    group.dataset.title = title;
    group.open = first ? at < 1 : !closed.has(title);
    return group;
  });
  board.replaceChildren(...sections);
}

async function followRun(place) {
  const path = `/run/${[of, other][place]}`;
  const run = await fetched(`${path}/state.json`, seen[place]);
  const state = [verdict(run.verdict), ` ${run.standing}, step ${run.step} of ${run.planned}, heard ${ago(run.heard)}`];
  document.getElementById(`state-${place}`).replaceChildren(...state);
  if (run.groups) {
    groups[place] = run.groups;
    figures[place] = new Map((await fetched(`${path}/curves.json`)).map((curve) => [curve.figure, curve]));
    if (groups.every(Boolean)) drawGroups();
  }
  for (const { figure, steps, values } of run.points) {
    charts.get(figure)?.add(place, steps, values);
    const own = figures[place].get(figure);
    if (own && steps[0] > own.steps.at(-1)) {
      own.steps.push(...steps);
      own.values.push(...values);
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
  document.getElementById("settings").replaceChildren(rows.length ? table : make("p", "muted", "None, but for where they write to."));
}

// ---- the same prompts

const ROW = 52;
let by = remembered("by") ?? "newest";
let asked = "";
const words = form.elements.text;
const question = () => ({ ...both, by, text: words.value });

function fill(element, row) {
  const [one, two] = row.means;
  const gain = one === null || two === null ? null : two - one;
  const figures = [["first", number(one)], ["second", number(two)], ["gain", (gain > 0 ? "+" : "") + number(gain)], ["answers", row.counts.join(" + ")]];
  element.replaceChildren(
    make("span", "item-text", make("span", "item-response", row.prompt)),
    ...figures.map(([name, value]) => make("span", `item-figure item-${name}`, make("span", "unit muted", name), value)),
  );
}

const list = new List(document.getElementById("list"), ROW, {
  load: (offset) => fetched("/compare/prompts.json", { ...question(), offset }),
  fill,
  open: async (row, opens) => {
    remember({ at: row.at, there: row.there }, opens);
    await showPair();
    if (opens) document.getElementById("both").scrollIntoView({ block: "nearest" });
  },
});

async function renewPrompts() {
  const values = question();
  const says = JSON.stringify(values);
  const page = await fetched("/compare/prompts.json", values);
  shared.hidden = page.total === 0;
  if (says !== asked || page.matched !== list.total) list.show(page, says === asked);
  asked = says;
  const parts = [page.matched === page.total ? `${count(page.total)} prompts` : `${count(page.matched)} of ${count(page.total)} prompts`];
  if (page.read < 1) parts.push(`of the newest answers; ${Math.floor(100 * page.read)}% read`);
  document.getElementById("matched").textContent = parts.join(", ");
  for (const button of document.querySelectorAll("#list-head button")) button.setAttribute("aria-pressed", button.dataset.sort === by);
  return page.read < 1 ? 0.2 : 5;
}

// ---- one prompt, answered twice

function marked(differences, own, row) {
  if (!differences.length) return text(String(row.response));
  const parts = differences.filter(([kind]) => kind === "same" || kind === own).map(([kind, words]) => (kind === "same" ? words : make("mark", kind, words)));
  const element = text("");
  element.replaceChildren(...parts);
  return element;
}

function side(found, place) {
  const name = ["at", "there"][place];
  const select = make("select");
  select.setAttribute("aria-label", `Answer of ${names[place]}`);
  for (const { at, step, score } of found.choices[place]) {
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
  const row = found.rows[place];
  return make("div", "", head, select, marked(found.differences, place ? "added" : "removed", row), scoresOf(row), tokenView(row));
}

async function showPair() {
  const [at, there] = [remembered("at"), remembered("there")];
  const element = document.getElementById("pair");
  if (at === null || there === null) {
    element.hidden = true;
    element.parentElement.classList.remove("split");
    return;
  }
  const found = await fetched("/compare/answers.json", { ...both, at, there });
  if (at !== remembered("at") || there !== remembered("there")) return;
  element.replaceChildren(text(found.prompts[0], "prompt-text"), make("div", "pair", side(found, 0), side(found, 1)));
  element.hidden = false;
  element.parentElement.classList.add("split");
}

// ---- wiring

words.value = remembered("text") ?? "";
repeat(async () => {
  const runs = [await followRun(0), await followRun(1)];
  if (!runs.every((run) => run.known)) return 0.2;
  return runs.some((run) => run.standing === "running") ? 2 : 5;
});
const ask = repeat(renewPrompts);
const later = calmly(ask, 250);
form.addEventListener("submit", (event) => event.preventDefault());
words.addEventListener("input", () => {
  remember({ text: words.value });
  later();
});
document.getElementById("list-head").addEventListener("click", (event) => {
  if (!event.target.dataset.sort) return;
  by = event.target.dataset.sort;
  remember({ by });
  ask();
});
document.getElementById("download").addEventListener("click", (event) => {
  event.currentTarget.href = `/compare/disputed.jsonl?${new URLSearchParams({ ...both, most: document.getElementById("most").value })}`;
});
addEventListener("popstate", showPair);
fetched("/compare/settings.json", both).then(drawSettings);
showPair();
