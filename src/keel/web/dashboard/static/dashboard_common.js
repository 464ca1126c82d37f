// Functions that all pages of the dashboard share. Text from a run only ever becomes a text node.

export function make(tag, name = "", ...children) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// Format a number with three significant digits; a dash if it was not measured.
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

const VERDICTS = { healthy: "healthy", notice: "notice", warning: "warning", critical: "critical", unknown: "not known yet" };

export const verdict = (name) => make("span", `verdict ${name in VERDICTS ? name : "unknown"}`, VERDICTS[name] ?? name);

// A small curve without axes. Gaps stay gaps.
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

// A failed request. The message is shown on the page.
export class Trouble extends Error {}

export async function fetched(path, values = {}, signal = undefined) {
  const parameters = new URLSearchParams();
  for (const [name, value] of Object.entries(values)) if (value !== "" && value !== null && value !== undefined) parameters.set(name, value);
  const limit = AbortSignal.timeout(20_000);
  const trouble = (message, cause) => new Trouble(signal?.aborted ? "" : message, { cause }); // a cancelled request needs no message
  let response;
  try {
    response = await fetch(`${path}?${parameters}`, { signal: signal ? AbortSignal.any([signal, limit]) : limit });
  } catch (error) {
    throw trouble("keel serve does not respond; trying again.", error);
  }
  if (response.status === 401) location.reload(); // the reloaded page explains how to sign in
  let result;
  try {
    result = await response.json(); // also fails if the request is cancelled after the headers have arrived
  } catch (error) {
    throw trouble("The reply was incomplete.", error);
  }
  if (!response.ok) throw new Trouble(result.error);
  return result;
}

// Call `work` repeatedly while the page is visible. It returns the number of seconds until the next call.
export function repeat(work) {
  const freshness = document.getElementById("freshness");
  let timer = 0;
  let turns = 0;
  async function turn() {
    clearTimeout(timer);
    const current = (turns += 1); // a call that was overtaken by a later one schedules nothing
    let seconds = 3;
    try {
      seconds = await work();
      freshness.textContent = "";
    } catch (error) {
      if (!(error instanceof Trouble)) throw error;
      freshness.textContent = error.message;
    } finally {
      if (current === turns && document.visibilityState === "visible") timer = setTimeout(turn, 1000 * seconds);
    }
  }
  document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && turn());
  turn();
  return turn;
}

// Keep the state of the page in its address, so that a link reproduces it.
export function remember(values, push = false) {
  const address = new URL(location.href);
  for (const [name, value] of Object.entries(values)) {
    if (value === "" || value === null || value === undefined) address.searchParams.delete(name);
    else address.searchParams.set(name, value);
  }
  if (address.href !== location.href) history[push ? "pushState" : "replaceState"](null, "", address);
}

export const remembered = (name) => new URLSearchParams(location.search).get(name);

// Delay a call until there was none for some time.
export function debounced(work, milliseconds) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...values), milliseconds);
  };
}
