// Update the statistics every ten seconds without disturbing opened details, the focus or a selection.

const PERIOD = 10_000; // milliseconds

const isSelecting = () => !getSelection().isCollapsed;

async function fetchMain() {
  const response = await fetch("/owner", { signal: AbortSignal.timeout(PERIOD) });
  if (!response.ok) throw new Error(`The server replied with status ${response.status}.`);
  return new DOMParser().parseFromString(await response.text(), "text/html").querySelector("main");
}

// Replace the sections that changed. Open details stay open.
function renew(main) {
  const current = document.querySelectorAll("main > section");
  const next = main.querySelectorAll(":scope > section");
  for (const details of document.querySelectorAll("details[open]")) {
    main.querySelector(`#${details.id}`)?.setAttribute("open", "");
  }
  current.forEach((section, at) => {
    if (section.outerHTML !== next[at].outerHTML) swap(section, next[at]);
  });
}

function swap(section, next) {
  const focusable = "summary, [tabindex]";
  const at = [...section.querySelectorAll(focusable)].indexOf(document.activeElement);
  section.replaceWith(next);
  next.querySelectorAll(focusable)[at]?.focus({ preventScroll: true });
}

async function update() {
  const freshness = document.getElementById("freshness");
  const main = await fetchMain().catch(() => null);
  if (!main) {
    freshness.textContent = "These statistics are out of date: the server does not respond. Trying again every ten seconds.";
  } else if (!isSelecting()) {
    renew(main);
    freshness.textContent = `As of ${new Date().toLocaleTimeString()}; updated every ten seconds.`;
  }
}

setInterval(() => document.visibilityState === "visible" && update(), PERIOD);
