// The list of runs, which is updated in place, sorted and filtered in the browser.

import { ago, fetched, make, number, remember, remembered, repeat, spark, verdict } from "./dashboard_common.js";

if (location.pathname === "/enter") history.replaceState(null, "", "/"); // keep the token out of the browser's history

const body = document.getElementById("runs");
const filter = document.getElementById("filter");
const compare = document.getElementById("compare");
const rows = new Map(); // by name: the row and the summary that it shows
const chosen = new Set(); // names of the runs to compare
const sort = { by: remembered("sort") ?? "title", down: remembered("order") === "down" };
const known = new Map(); // by name: the last summary from the server
let runs = [];
let version = "";

const WORST = ["critical", "warning", "notice", "healthy", "unknown"];
const KEYS = {
  title: (run) => run.title.toLowerCase(),
  verdict: (run) => WORST.indexOf(run.verdict),
  standing: (run) => run.standing,
  progress: (run) => run.step / run.planned,
  score: (run) => run.score,
  kl: (run) => run.kl,
  heard: (run) => run.heard,
};

function ordered() {
  const key = KEYS[sort.by] ?? KEYS.title;
  const compareKeys = (one, other) => {
    if (one === null || other === null) return (one === null) - (other === null); // runs without a value last, in either order
    const sign = sort.down ? -1 : 1;
    return typeof one === "string" ? sign * one.localeCompare(other, "en", { numeric: true }) : sign * (one - other);
  };
  return [...runs].sort((one, other) => compareKeys(key(one), key(other)) || compareKeys(KEYS.title(one), KEYS.title(other)));
}

const searchText = (run) => `${run.title} ${run.stage} ${run.standing} ${run.verdict} ${run.finding} ${run.findings.join(" ")}`.toLowerCase();

function draw() {
  const words = filter.value.trim().toLowerCase().split(/\s+/);
  const shown = ordered().filter((run) => words.every((word) => searchText(run).includes(word)));
  const elements = shown.map((run) => updatedRow(run));
  if (elements.length !== body.children.length || elements.some((element, at) => body.children[at] !== element)) {
    const focused = document.activeElement;
    body.replaceChildren(...elements);
    if (body.contains(focused)) focused.focus({ preventScroll: true });
  }
  document.getElementById("count").textContent = shown.length < runs.length ? `${shown.length} of ${runs.length} runs` : `${runs.length} run${runs.length === 1 ? "" : "s"}`;
  document.getElementById("none").hidden = runs.length > 0;
  document.getElementById("scroller").hidden = runs.length === 0;
  for (const head of document.querySelectorAll("th[data-sort]")) {
    head.setAttribute("aria-sort", head.dataset.sort !== sort.by ? "none" : sort.down ? "descending" : "ascending");
  }
  const names = [...chosen].filter((name) => runs.some((run) => run.name === name));
  compare.setAttribute("aria-disabled", names.length !== 2);
  if (names.length === 2) compare.href = `/compare?of=${names[0]}&with=${names[1]}`;
  else compare.removeAttribute("href");
}

// Reuse the row of a run, so that a selection or the focus in it stays.
function updatedRow(run) {
  const summary = JSON.stringify(run);
  const entry = rows.get(run.name) ?? { row: newRow(run) };
  if (entry.summary !== summary) {
    fill(entry.row, run);
    rows.set(run.name, { row: entry.row, summary });
  }
  entry.row.querySelector(".heard").textContent = ago(run.heard);
  return entry.row;
}

function newRow(run) {
  const row = make("tr");
  const box = make("input");
  box.type = "checkbox";
  box.addEventListener("change", () => {
    chosen[box.checked ? "add" : "delete"](run.name);
    if (chosen.size > 2) deselect([...chosen][0]);
    draw();
  });
  const link = make("a", "run-link");
  link.href = `/run/${run.name}`;
  row.append(make("td", "choice", box), make("th", "", link, make("span", "stage small muted")), ...Array.from({ length: 6 }, () => make("td")));
  row.children[1].scope = "row";
  row.children[7].className = "heard muted";
  return row;
}

function deselect(name) {
  chosen.delete(name);
  rows.get(name).row.querySelector("input").checked = false;
}

function fill(row, run) {
  const [choice, head, state, standing, progress, score, kl] = row.children;
  choice.firstChild.setAttribute("aria-label", `Compare ${run.title}`);
  head.querySelector("a").textContent = run.title;
  head.querySelector(".stage").textContent = run.stage === "unknown" ? "" : run.stage;
  const more = run.findings.length > 1 ? [make("span", "muted small nowrap", ` +${run.findings.length - 1} more`)] : [];
  state.className = "verdict-cell";
  state.replaceChildren(verdict(run.verdict), ...more, make("span", "finding small", run.finding));
  standing.replaceChildren(make("span", `standing ${run.standing}`, run.standing), ...notes(run));
  const bar = make("progress");
  Object.assign(bar, { max: run.planned, value: run.step });
  bar.setAttribute("aria-label", `step ${run.step} of ${run.planned}`);
  progress.replaceChildren(bar, make("span", "small muted nowrap", `${run.step} / ${run.planned}`));
  standing.className = "standing-cell";
  progress.className = "progress-cell";
  score.className = "number score-cell";
  kl.className = "number kl-cell";
  score.replaceChildren(...scoreParts(run));
  kl.textContent = number(run.kl);
}

function notes(run) {
  const badges = run.incomplete.length ? [make("span", "badge-incomplete", "incomplete")] : [];
  if (badges.length) badges[0].title = run.incomplete.join("; ");
  return run.what ? [...badges, make("span", "why small muted", run.what)] : badges;
}

function scoreParts(run) {
  if (!run.headline) return ["–"];
  const label = run.score === null ? [make("span", "unit muted", run.headline.figure.split("/")[1].replace("eval_", ""))] : [];
  const score = make("span", "score-figure", ...label, number(run.headline.last));
  return [spark(run.headline.values), score].filter(Boolean);
}

document.querySelector("thead").addEventListener("click", (event) => {
  const by = event.target.closest("th[data-sort]")?.dataset.sort;
  if (!by) return;
  sort.down = sort.by === by ? !sort.down : ["score", "heard", "progress"].includes(by);
  sort.by = by;
  remember({ sort: by, order: sort.down ? "down" : "up" });
  draw();
});
filter.value = remembered("filter") ?? "";
filter.addEventListener("input", () => {
  remember({ filter: filter.value });
  draw();
});

repeat(async () => {
  const changes = await fetched("/runs.json", { version }); // only what changed since that version
  version = changes.version;
  for (const run of changes.runs) known.set(run.name, run);
  runs = (changes.names ?? runs.map((run) => run.name)).map((name) => known.get(name));
  document.getElementById("folder").textContent = changes.folder;
  draw();
  return runs.every((run) => run.known) ? 3 : 0.2;
});
