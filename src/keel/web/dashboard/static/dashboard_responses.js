// The answers of a run: search, filters and order, the list, and the one that is open. The address says all of it.

import { drawAnswer } from "./dashboard_response.js";
import { calmly, count, fetched, make, number, remember, remembered, repeat, Trouble } from "./dashboard_common.js";
import { List } from "./dashboard_list.js";

const ROW = 52; // pixels
const form = document.getElementById("filters");
const section = document.getElementById("answers");
const drawer = document.getElementById("answer");
const newer = document.getElementById("newer");
const matched = document.getElementById("matched");
const fields = [...form.elements].filter((field) => field.name);
const buttons = [...document.querySelectorAll("#list-head button")];

let path = "";
let list;
let sort = { sort: remembered("sort") ?? "step", order: remembered("order") ?? "down" };
let asked = ""; // the question whose rows are in the list
let until; // the byte of the file up to which rows are shown: those that come later do not push them about
let waiting; // the request that a newer question cancels

const question = () => ({ ...Object.fromEntries(fields.map((field) => [field.name, field.value === "any" ? "" : field.value])), ...sort });

// ---- the list

const LENGTH = ["tokens", (row) => row.length];
const APART = ["apart", (row) => number(row.apart)]; // how far apart the scorers place it
const figuresOf = (row) => [["score", (row) => number(row.score)], ["KL", (row) => number(row.kl)], row.apart === null ? LENGTH : APART, ["step", (row) => row.step]];

// An element of the list is filled again and again: its texts change, its parts stay.
function fill(element, row) {
  if (!element.parts) {
    const [response, flag, prompt] = [make("span"), make("span", "flag", "cut"), make("span", "item-prompt muted")];
    const figures = figuresOf(row).map(([name]) => make("span", `item-figure item-${name}`, make("span", "unit muted", ""), new Text()));
    element.append(make("span", "item-text", make("span", "item-response", response, flag), prompt), ...figures);
    element.parts = { response, flag, prompt, figures };
  }
  const { response, flag, prompt, figures } = element.parts;
  response.textContent = row.response;
  prompt.textContent = row.prompt;
  flag.hidden = !row.truncated;
  figuresOf(row).forEach(([name, value], at) => {
    figures[at].firstChild.textContent = name;
    figures[at].lastChild.data = value(row);
  });
}

function describe(page) {
  const parts = [page.matched === page.total ? `${count(page.total)} answers` : `${count(page.matched)} of ${count(page.total)} answers`];
  if (page.read < 1) parts.push(`the newest ones; ${Math.floor(100 * page.read)}% of the file read`);
  if (page.searched < 1) parts.push(`${Math.floor(100 * page.searched)}% searched`);
  const said = parts.join(", ");
  if (matched.textContent !== said) matched.textContent = said;
}

function describeForm(page) {
  for (const field of fields) {
    const [name, end] = field.name.split("_");
    const range = page.ranges[name];
    if (range) field.placeholder = number(range[end === "to" ? 1 : 0]);
  }
  const used = fields.filter((field) => field.name !== "text" && field.value !== "" && field.value !== "any").length;
  document.getElementById("filtered").textContent = used ? `(${used})` : "";
  document.getElementById("disputed").hidden = page.scorers.length < 2;
  for (const button of buttons) {
    const own = button.dataset.sort === sort.sort;
    button.setAttribute("aria-pressed", own);
    button.dataset.order = own ? sort.order : "";
    if (button.dataset.sort === "disagreement") button.hidden = page.scorers.length < 2;
  }
  newer.hidden = !page.newer;
  newer.textContent = `${count(page.newer)} newer answer${page.newer === 1 ? "" : "s"}: show`;
}

// Asks again; rows stay where they are unless the question is another, or the reader stands at the top of the newest.
async function renew() {
  const values = question();
  const says = JSON.stringify(values);
  const follows = list.element.scrollTop === 0 && list.active < 0;
  const another = says !== asked;
  waiting?.abort();
  waiting = new AbortController();
  const page = await fetched(`${path}/answers.json`, { ...values, until: another || follows ? "" : until }, waiting.signal);
  if (says !== JSON.stringify(question())) return 0.1;
  section.hidden = page.total === 0;
  const atEnd = sort.sort === "step" && sort.order === "down"; // where rows that are found later belong
  if (another || page.until !== until) list.show(page, !another);
  else if (page.matched !== list.total) list[atEnd ? "grow" : "show"](page, true);
  asked = says;
  until = page.until;
  describe(page);
  describeForm(page);
  return page.read < 1 || page.searched < 1 ? 0.05 : 2;
}

// ---- the open answer

async function open(row, opens) {
  if (!opens && drawer.hidden) return;
  remember({ answer: row.at }, drawer.hidden);
  await showRemembered();
}

async function showRemembered() {
  const at = remembered("answer");
  if (at === null) {
    drawer.hidden = true;
    return;
  }
  try {
    const found = await fetched(`${path}/answer.json`, { at });
    if (at === remembered("answer")) drawAnswer(drawer, found, close);
  } catch (error) {
    if (!(error instanceof Trouble)) throw error;
    drawer.replaceChildren(make("p", "alert", error.message));
    drawer.hidden = false;
  }
}

function close() {
  remember({ answer: null }, true);
  drawer.hidden = true;
  list.element.focus({ preventScroll: true });
}

// ---- wiring

function restore() {
  for (const field of fields) field.value = remembered(field.name) ?? (field.tagName === "SELECT" ? "any" : "");
  sort = { sort: remembered("sort") ?? "step", order: remembered("order") ?? "down" };
}

function onButton(event) {
  const by = event.target.closest("button")?.dataset.sort;
  if (!by) return;
  const up = sort.sort === by && sort.order === "down";
  sort = { sort: by, order: up ? "up" : "down" };
  remember(by === "step" && !up ? { sort: null, order: null } : sort);
  ask();
}

let ask = () => {};

export function startAnswers(name) {
  path = `/run/${name}`;
  restore();
  list = new List(document.getElementById("list"), ROW, {
    load: (offset) => fetched(`${path}/answers.json`, { ...question(), until, offset }),
    fill,
    open,
  });
  ask = repeat(renew);
  const later = calmly(ask, 250);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => {
    if (!event.target.name) return;
    const value = event.target.value;
    remember({ [event.target.name]: value === "any" ? null : value });
    later();
  });
  form.addEventListener("reset", () => {
    setTimeout(() => {
      remember(Object.fromEntries(fields.map((field) => [field.name, null])));
      ask();
    });
  });
  document.getElementById("list-head").addEventListener("click", onButton);
  newer.addEventListener("click", () => {
    until = "";
    asked = "";
    ask();
  });
  document.getElementById("download").addEventListener("click", onDownload);
  addEventListener("popstate", () => {
    restore();
    ask();
    showRemembered();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !drawer.hidden) close();
  });
  showRemembered();
}

function onDownload(event) {
  const values = { ...question(), most: document.getElementById("most").value };
  event.currentTarget.href = `${path}/disputed.jsonl?${new URLSearchParams(values)}`;
}
