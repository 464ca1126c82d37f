// The responses of a run: search, filters, order, the list, and the open response. The address holds all of this state.

import { drawResponse } from "./dashboard_response.js";
import { debounced, count, fetched, make, number, remember, remembered, repeat, Trouble } from "./dashboard_common.js";
import { List } from "./dashboard_list.js";

const ROW = 52; // pixels
const form = document.getElementById("filters");
const section = document.getElementById("responses");
const drawer = document.getElementById("response");
const newer = document.getElementById("newer");
const matched = document.getElementById("matched");
const fields = [...form.elements].filter((field) => field.name);
const buttons = [...document.querySelectorAll("#list-head button")];

let path = "";
let list;
let sort = { sort: remembered("sort") ?? "step", order: remembered("order") ?? "down" };
let listed = ""; // the query whose rows are in the list
let until; // byte of the file up to which rows are shown, so that later responses do not move them
let pending; // AbortController of the current request, which a new query cancels

const query = () => ({ ...Object.fromEntries(fields.map((field) => [field.name, field.value === "any" ? "" : field.value])), ...sort });

// ---- the list

const LENGTH = ["tokens", (row) => row.length];
const DISAGREEMENT = ["disagree", (row) => number(row.apart)]; // of the scorers
const metricsOf = (row) => [["score", (row) => number(row.score)], ["KL", (row) => number(row.kl)], row.apart === null ? LENGTH : DISAGREEMENT, ["step", (row) => row.step]];

// List elements are reused: their parts are created once, then only the texts change.
function fill(element, row) {
  if (!element.parts) {
    const [response, flag, prompt] = [make("span"), make("span", "flag", "truncated"), make("span", "item-prompt muted")];
    const metrics = metricsOf(row).map(([name]) => make("span", `item-figure item-${name}`, make("span", "unit muted", ""), new Text()));
    element.append(make("span", "item-text", make("span", "item-response", response, flag), prompt), ...metrics);
    element.parts = { response, flag, prompt, metrics };
  }
  const { response, flag, prompt, metrics } = element.parts;
  response.textContent = row.response;
  prompt.textContent = row.prompt;
  flag.hidden = !row.truncated;
  metricsOf(row).forEach(([name, value], at) => {
    metrics[at].firstChild.textContent = name;
    metrics[at].lastChild.data = value(row);
  });
}

function describe(page) {
  const parts = [page.matched === page.total ? `${count(page.total)} responses` : `${count(page.matched)} of ${count(page.total)} responses`];
  if (page.read < 1) parts.push(`newest only; ${Math.floor(100 * page.read)}% of the file read`);
  if (page.searched < 1) parts.push(`${Math.floor(100 * page.searched)}% searched`);
  const summary = parts.join(", ");
  if (matched.textContent !== summary) matched.textContent = summary; // a status region is announced again when set
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
    const active = button.dataset.sort === sort.sort;
    button.setAttribute("aria-pressed", active);
    button.dataset.order = active ? sort.order : "";
    if (button.dataset.sort === "disagreement") button.hidden = page.scorers.length < 2;
  }
  newer.hidden = !page.newer;
  newer.textContent = `${count(page.newer)} newer response${page.newer === 1 ? "" : "s"}: show`;
}

// Request the list again. Rows stay in place unless the query has changed, or the list is scrolled to the top.
async function refresh() {
  const values = query();
  const key = JSON.stringify(values);
  const follows = list.element.scrollTop === 0 && list.active < 0;
  const changed = key !== listed;
  pending?.abort();
  pending = new AbortController();
  const page = await fetched(`${path}/answers.json`, { ...values, until: changed || follows ? "" : until }, pending.signal);
  if (key !== JSON.stringify(query())) return 0.1;
  section.hidden = page.total === 0;
  const atEnd = sort.sort === "step" && sort.order === "down"; // rows that a continued search finds are appended
  if (changed || page.until !== until) list.show(page, !changed);
  else if (page.matched !== list.total) list[atEnd ? "grow" : "show"](page, true);
  listed = key;
  until = page.until;
  describe(page);
  describeForm(page);
  return page.read < 1 || page.searched < 1 ? 0.05 : 2;
}

// ---- the open response

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
    const response = await fetched(`${path}/answer.json`, { at });
    if (at === remembered("answer")) drawResponse(drawer, response, close);
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
  refreshNow();
}

let refreshNow = () => {};

export function startResponses(name) {
  path = `/run/${name}`;
  restore();
  list = new List(document.getElementById("list"), ROW, {
    load: (offset) => fetched(`${path}/answers.json`, { ...query(), until, offset }),
    fill,
    open,
  });
  refreshNow = repeat(refresh);
  const later = debounced(refreshNow, 250);
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
      refreshNow();
    });
  });
  document.getElementById("list-head").addEventListener("click", onButton);
  newer.addEventListener("click", () => {
    until = "";
    listed = "";
    refreshNow();
  });
  document.getElementById("download").addEventListener("click", onDownload);
  addEventListener("popstate", () => {
    restore();
    refreshNow();
    showRemembered();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !drawer.hidden) close();
  });
  showRemembered();
}

function onDownload(event) {
  const values = { ...query(), most: document.getElementById("most").value };
  event.currentTarget.href = `${path}/disputed.jsonl?${new URLSearchParams(values)}`;
}
