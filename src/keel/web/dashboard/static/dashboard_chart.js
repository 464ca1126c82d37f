// A line chart of a metric over the steps. All charts of a page share the step at the pointer.

import { make, number, svg } from "./dashboard_common.js";
import { isVisible, requestDraw, unwatch, watch } from "./dashboard_visibility.js";

const HEIGHT = 132;
const LEFT = 46; // pixels for the axis labels
const RIGHT = 10;
const [TOP, BOTTOM] = [8, 20];
const charts = new Set();
let pointed = null; // the step at the pointer, or null
let dragged = null; // the step at which a drag began, or null
export const zoom = { steps: null, change: () => {} }; // `steps` is [first, last] of the steps shown, or null for all

export class Chart {
  // `names` holds the name of one series, or those of two that are compared.
  constructor({ figure, label, means }, names = [""]) {
    this.label = label;
    this.series = names.map((name) => ({ name, steps: [], values: [], trend: null }));
    this.spans = []; // {from, to, severity} of each finding that rests on this metric
    this.last = make("span", "chart-value");
    this.plot = svg("svg", { class: "plot", height: HEIGHT, role: "img", tabindex: "0" });
    this.element = make("figure", "chart", make("figcaption", "", make("h4", "", label), this.last), this.plot, make("p", "means small muted", means));
    this.element.id = `figure-${figure}`;
    this.element.title = figure;
    this.width = 0;
    this.stale = true;
    charts.add(this);
    watch(this);
    this.plot.addEventListener("pointermove", (event) => point(this.stepAt(event)));
    this.plot.addEventListener("pointerleave", () => point(null));
    this.plot.addEventListener("pointerdown", (event) => (dragged = event.button ? null : this.stepAt(event)));
    this.plot.addEventListener("pointerup", (event) => this.onRelease(event));
    this.plot.addEventListener("dblclick", () => zoom.change(null));
    this.plot.addEventListener("blur", () => point(null));
    this.plot.addEventListener("keydown", (event) => this.onKey(event));
  }

  set(place, { steps, values, trend = null }) {
    Object.assign(this.series[place], { steps: [...steps], values: [...values], trend });
    this.invalidate();
  }

  // Append new points. Steps that are already there are skipped.
  add(place, steps, values) {
    if (zoom.steps) return;
    const series = this.series[place];
    steps.forEach((step, at) => {
      if (series.steps.length && step <= series.steps.at(-1)) return;
      series.steps.push(step);
      series.values.push(values[at]);
    });
    this.invalidate();
  }

  mark(spans) {
    this.spans = spans;
    this.invalidate();
  }

  invalidate() {
    this.stale = true;
    this.plot.setAttribute("aria-label", this.describe());
    if (isVisible(this)) requestDraw(this);
  }

  // Whether the two curves are identical.
  get isSame() {
    const [one, other] = this.series.map(({ steps, values }) => JSON.stringify([steps, values]));
    return one === other;
  }

  // ---- scales

  get range() {
    if (zoom.steps) return zoom.steps;
    const steps = this.series.flatMap(({ steps }) => (steps.length ? [steps[0], steps.at(-1)] : []));
    return steps.length ? [Math.min(...steps), Math.max(...steps)] : [0, 1];
  }

  x(step) {
    const [first, last] = this.range;
    return LEFT + ((step - first) / (last - first || 1)) * (this.width - LEFT - RIGHT);
  }

  stepAt(event) {
    const [first, last] = this.range;
    const share = (event.offsetX - LEFT) / (this.width - LEFT - RIGHT);
    return Math.round(first + Math.min(Math.max(share, 0), 1) * (last - first));
  }

  // A drag from one step to another zooms in on the steps between them.
  onRelease(event) {
    const steps = [dragged, this.stepAt(event)].sort((one, other) => one - other);
    const [first, last] = this.range;
    if (dragged !== null && steps[1] - steps[0] > (last - first) / 50) zoom.change(steps);
    dragged = null;
    this.point();
  }

  // ---- drawing

  draw() {
    if (!this.stale || !this.width) return;
    this.stale = false;
    this.plot.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    const [low, high, ticks] = scale(this.series.flatMap(({ values }) => values));
    this.y = (value) => HEIGHT - BOTTOM - ((value - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
    this.pointer = svg("g", { class: "pointer" });
    this.plot.replaceChildren(...this.shades(), ...this.axes(ticks), ...this.series.flatMap((series, at) => this.lines(series, at)), this.pointer);
    this.point();
  }

  shades() {
    const [first, last] = this.range;
    return this.spans.filter(({ from, to }) => from <= last && (to ?? last) >= first).map(({ from, to, severity }) => {
      const [start, end] = [this.x(Math.max(from, first)), this.x(Math.min(to ?? last, last))];
      return svg("rect", { class: `shade ${severity}`, x: start, y: TOP, width: Math.max(end - start, 2), height: HEIGHT - TOP - BOTTOM });
    });
  }

  axes(ticks) {
    const across = ticks.flatMap((tick) => [
      svg("line", { class: "grid", x1: LEFT, x2: this.width - RIGHT, y1: this.y(tick), y2: this.y(tick) }),
      svg("text", { class: "tick", x: LEFT - 6, y: this.y(tick) + 3.5, "text-anchor": "end" }, number(tick)),
    ]);
    const [first, last] = this.range;
    const ends = [...new Set([first, last])].map((step, at) =>
      svg("text", { class: "tick", x: at ? this.width - RIGHT : LEFT, y: HEIGHT - 5, "text-anchor": at ? "end" : "start" }, at ? `step ${step}` : String(step)),
    );
    return [...across, ...ends];
  }

  lines({ steps, values, trend }, place) {
    const paths = [svg("path", { class: `line line-${place} ${trend ? "behind" : ""}`, d: this.path(steps, values) })];
    if (trend) paths.push(svg("path", { class: `line line-${place}`, d: this.path(trend.steps, trend.values) }));
    return paths;
  }

  // A gap breaks the line. A point between two gaps becomes a dot, by a very short segment with round ends.
  path(steps, values) {
    let path = "";
    let open = false;
    values.forEach((value, at) => {
      if (value === null) open = false;
      else {
        const place = `${this.x(steps[at]).toFixed(1)} ${this.y(value).toFixed(1)}`;
        path += open ? `L${place}` : `M${place}${(values[at + 1] ?? null) === null ? "h0.01" : ""}`;
        open = true;
      }
    });
    return path;
  }

  describe() {
    const parts = this.series.map(({ name, steps, values }) => {
      const last = values.findLastIndex((value) => value !== null);
      return last < 0 ? "" : `${name} ${number(values[last])} at step ${steps[last]}`.trim();
    });
    return `${this.label}: ${parts.filter(Boolean).join("; ")}`;
  }

  // ---- the step at the pointer

  nearest({ steps, values }) {
    let at = pointed === null ? steps.length - 1 : below(steps, pointed);
    if (pointed !== null && at + 1 < steps.length && steps[at + 1] - pointed < pointed - steps[at]) at += 1;
    while (pointed === null && at > 0 && values[at] === null) at -= 1;
    return at;
  }

  point() {
    if (!this.pointer) return;
    const marks = [];
    const texts = this.series.map((series, place) => {
      const at = this.nearest(series);
      const value = series.values[at] ?? null;
      if (pointed !== null && value !== null) marks.push(svg("circle", { class: `dot line-${place}`, cx: this.x(series.steps[at]), cy: this.y(value), r: 3.5 }));
      return make("span", `value-${place}`, number(value));
    });
    if (this.isSame) texts.push(make("span", "muted small", "identical"));
    if (pointed !== null) {
      const x = this.x(Math.min(Math.max(pointed, this.range[0]), this.range[1]));
      marks.unshift(svg("line", { class: "cursor", x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM }));
      if (dragged !== null) {
        const from = this.x(dragged);
        marks.unshift(svg("rect", { class: "drag", x: Math.min(x, from), y: TOP, width: Math.abs(x - from), height: HEIGHT - TOP - BOTTOM }));
      }
      texts.push(make("span", "muted", `step ${pointed}`));
    }
    this.pointer.replaceChildren(...marks);
    this.last.replaceChildren(...texts);
  }

  onKey(event) {
    const [first, last] = this.range;
    const by = Math.max(1, Math.round((last - first) / 50)) * { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const to = { Home: first, End: last, Escape: null }[event.key];
    if (to === undefined && Number.isNaN(by)) return;
    event.preventDefault();
    point(to === undefined ? Math.min(Math.max((pointed ?? (by > 0 ? first - by : last - by)) + by, first), last) : to);
  }
}

function point(step) {
  if (step === pointed) return;
  pointed = step;
  requestAnimationFrame(() => {
    for (const chart of charts) if (isVisible(chart)) chart.point();
  });
}

// Return the index of the last step that is not above this one.
function below(steps, step) {
  let [low, high] = [0, steps.length - 1];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (steps[middle] <= step) low = middle;
    else high = middle - 1;
  }
  return low;
}

// Return the lowest and highest value with a margin, and two to four round numbers between them.
function scale(values) {
  const known = values.filter((value) => value !== null);
  let low = known.reduce((one, other) => Math.min(one, other), Infinity);
  let high = known.reduce((one, other) => Math.max(one, other), -Infinity);
  if (!known.length) [low, high] = [0, 1];
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  const margin = (high - low) * 0.04;
  [low, high] = [low - margin, high + margin];
  const rough = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const unit = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough);
  const ticks = [];
  for (let tick = Math.ceil(low / unit) * unit; tick <= high; tick += unit) ticks.push(Math.abs(tick) < unit / 1e6 ? 0 : tick);
  return [low, high, ticks];
}

// On paper, all groups are open and all charts visible.
addEventListener("beforeprint", () => {
  for (const group of document.querySelectorAll("details.group")) group.open = true;
  for (const chart of charts) {
    chart.width ||= chart.plot.clientWidth;
    chart.draw();
  }
});

export function discard(chart) {
  charts.delete(chart);
  unwatch(chart);
}
