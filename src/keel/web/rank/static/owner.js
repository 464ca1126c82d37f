// Renews the figures every ten seconds, and leaves alone what the owner opened, reads, focused or selected.

const PERIOD = 10_000; // milliseconds

const isSelecting = () => !getSelection().isCollapsed;

async function fetchMain() {
  const response = await fetch("/owner", { signal: AbortSignal.timeout(PERIOD) });
  if (!response.ok) throw new Error(`The server answered ${response.status}.`);
  return new DOMParser().parseFromString(await response.text(), "text/html").querySelector("main");
}

// New sections take the places of those that changed; details stay open.
function renew(main) {
  const before = document.querySelectorAll("main > section");
  const after = main.querySelectorAll(":scope > section");
  for (const details of document.querySelectorAll("details[open]")) {
    main.querySelector(`#${details.id}`)?.setAttribute("open", "");
  }
  before.forEach((section, at) => {
    if (section.outerHTML !== after[at].outerHTML) swap(section, after[at]);
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
    freshness.textContent = "These figures are old: the server does not answer. Trying again every ten seconds.";
  } else if (!isSelecting()) {
    renew(main);
    freshness.textContent = `As of ${new Date().toLocaleTimeString()}; renewed every ten seconds.`;
  }
}

setInterval(() => document.visibilityState === "visible" && update(), PERIOD);
