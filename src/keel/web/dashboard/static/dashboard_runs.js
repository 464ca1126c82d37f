// The list of runs: renewed in place, sorted and filtered here.

import { ago, fetched, make, number, remember, remembered, repeat, spark, verdict } from "./dashboard_common.js";

if (location.pathname === "/enter") history.replaceState(null, "", "/"); // the link's token stays out of the history

const body = document.getElementById("runs");
const filter = document.getElementById("filter");
const compare = document.getElementById("compare");
const rows = new Map(); // by name: the row and what it shows
const chosen = new Set(); // names of the runs to compare
const sort = { by: remembered("sort") ?? "title", down: remembered("order") === "down" };
const known = new Map(); // by name: what the server said last
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
    if (one === null || other === null) return (one === null) - (other === null); // unmeasured last, either way
    const sign = sort.down ? -1 : 1;
    return typeof one === "string" ? sign * one.localeCompare(other, "en", { numeric: true }) : sign * (one - other);
  };
  return [...runs].sort((one, other) => compareKeys(key(one), key(other)) || compareKeys(KEYS.title(one), KEYS.title(other)));
}

const words = (run) => `${run.title} ${run.stage} ${run.standing} ${run.verdict} ${run.finding} ${run.findings.join(" ")}`.toLowerCase();

function draw() {
  const wanted = filter.value.trim().toLowerCase().split(/\s+/);
  const shown = ordered().filter((run) => wanted.every((word) => words(run).includes(word)));
  const elements = shown.map((run) => rowOf(run));
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

// The same row for the same run, so a selection or a focus in it stays.
function rowOf(run) {
  const says = JSON.stringify(run);
  const known = rows.get(run.name) ?? { row: fresh(run) };
  if (known.says !== says) {
    fill(known.row, run);
    rows.set(run.name, { row: known.row, says });
  }
  known.row.querySelector(".heard").textContent = ago(run.heard);
  return known.row;
}

function fresh(run) {
  const row = make("tr");
  const box = make("input");
  box.type = "checkbox";
  box.addEventListener("change", () => {
    chosen[box.checked ? "add" : "delete"](run.name);
    if (chosen.size > 2) unchoose([...chosen][0]);
    draw();
  });
  const link = make("a", "run-link");
  link.href = `/run/${run.name}`;
  row.append(make("td", "choice", box), make("th", "", link, make("span", "stage small muted")), ...Array.from({ length: 6 }, () => make("td")));
  row.children[1].scope = "row";
  row.children[7].className = "heard muted";
  return row;
}

function unchoose(name) {
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
  score.replaceChildren(...scoreOf(run));
  kl.textContent = number(run.kl);
}

function notes(run) {
  const found = run.incomplete.length ? [make("span", "badge-incomplete", "incomplete")] : [];
  if (found.length) found[0].title = run.incomplete.join("; ");
  return run.what ? [...found, make("span", "why small muted", run.what)] : found;
}

function scoreOf(run) {
  if (!run.headline) return ["–"];
  const label = run.score === null ? [make("span", "unit muted", run.headline.figure.split("/")[1].replace("eval_", ""))] : [];
  const figure = make("span", "score-figure", ...label, number(run.headline.last));
  return [spark(run.headline.values), figure].filter(Boolean);
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
  const found = await fetched("/runs.json", { version }); // only what has changed since
  version = found.version;
  for (const run of found.runs) known.set(run.name, run);
  runs = (found.names ?? runs.map((run) => run.name)).map((name) => known.get(name));
  document.getElementById("folder").textContent = found.folder;
  draw();
  return runs.every((run) => run.known) ? 3 : 0.2;
});
