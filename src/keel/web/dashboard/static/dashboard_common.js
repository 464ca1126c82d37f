// What all pages of the dashboard share. Text that a run wrote becomes a text node, and nothing else.

export function make(tag, name = "", ...children) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// Three significant digits; a dash for what was not measured.
export function number(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size && (size < 0.001 || size >= 1e6)) return value.toExponential(1).replace("e+", "e").replaceAll("-", "−");
  return Number(value.toPrecision(3)).toLocaleString("en", { maximumFractionDigits: 6 }).replace("-", "−");
}

export const count = (value) => value.toLocaleString("en");

export function ago(seconds) {
  const passed = Math.max(0, Date.now() / 1000 - seconds);
  const [size, unit] = passed < 90 ? [1, "s"] : passed < 5400 ? [60, "min"] : passed < 129600 ? [3600, "h"] : [86400, "d"];
  return seconds ? `${Math.round(passed / size)} ${unit} ago` : "never";
}

const VERDICTS = { healthy: "healthy", notice: "notice", warning: "warning", critical: "critical", unknown: "not yet known" };

export const verdict = (name) => make("span", `verdict ${name in VERDICTS ? name : "unknown"}`, VERDICTS[name] ?? name);

// A little curve without axes; gaps stay gaps.
export function spark(values) {
  const [width, height] = [96, 24];
  const known = values.filter((value) => value !== null);
  if (known.length < 2) return null;
  const [low, high] = [Math.min(...known), Math.max(...known)];
  const x = (at) => ((at / (values.length - 1)) * (width - 4) + 2).toFixed(1);
  const y = (value) => (height - 3 - ((value - low) / (high - low || 1)) * (height - 6)).toFixed(1);
  const path = values.map((value, at) => (value === null ? "" : `${at && values[at - 1] !== null ? "L" : "M"}${x(at)} ${y(value)}`));
  return svg("svg", { class: "spark", viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" }, svg("path", { d: path.join("") }));
}

export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// A request that did not bring what was asked for; the words are for the person.
export class Trouble extends Error {}

export async function fetched(path, values = {}, signal = undefined) {
  const asked = new URLSearchParams();
  for (const [name, value] of Object.entries(values)) if (value !== "" && value !== null && value !== undefined) asked.set(name, value);
  const limit = AbortSignal.timeout(20_000);
  const trouble = (words, cause) => new Trouble(signal?.aborted ? "" : words, { cause }); // who cancelled it knows
  let response;
  try {
    response = await fetch(`${path}?${asked}`, { signal: signal ? AbortSignal.any([signal, limit]) : limit });
  } catch (error) {
    throw trouble("keel serve does not answer; trying again.", error);
  }
  if (response.status === 401) location.reload(); // the page then says what to do
  let found;
  try {
    found = await response.json(); // which fails too when the request is cancelled after its head has come
  } catch (error) {
    throw trouble("The answer was cut short.", error);
  }
  if (!response.ok) throw new Trouble(found.error);
  return found;
}

// Does `work` now and then for as long as the page is seen; it returns after how many seconds again.
export function repeat(work) {
  const freshness = document.getElementById("freshness");
  let timer = 0;
  let turns = 0;
  async function turn() {
    clearTimeout(timer);
    const own = (turns += 1); // a turn that was overtaken by another does not go on
    let seconds = 3;
    try {
      seconds = await work();
      freshness.textContent = "";
    } catch (error) {
      if (!(error instanceof Trouble)) throw error;
      freshness.textContent = error.message;
    } finally {
      if (own === turns && document.visibilityState === "visible") timer = setTimeout(turn, 1000 * seconds);
    }
  }
  document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && turn());
  turn();
  return turn;
}

// The address of the page says what it shows, so a link leads back to it.
export function remember(values, push = false) {
  const address = new URL(location.href);
  for (const [name, value] of Object.entries(values)) {
    if (value === "" || value === null || value === undefined) address.searchParams.delete(name);
    else address.searchParams.set(name, value);
  }
  if (address.href !== location.href) history[push ? "pushState" : "replaceState"](null, "", address);
}

export const remembered = (name) => new URLSearchParams(location.search).get(name);

// Waits until nothing was asked for some time.
export function calmly(work, milliseconds) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...values), milliseconds);
  };
}
