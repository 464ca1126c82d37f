// The plots and the token view of the report. All data is in the page; nothing is requested.

(() => {
  "use strict";

  const data = JSON.parse(document.getElementById("data").textContent);
  const several = data.names.length > 1;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(hover: none)");
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
  const MARGIN = { l: 40, r: 10, t: 8, b: 40 };
  let paper = false; // while printing, use the light scheme of #paper
  let root = false; // the x axis is the square root of the KL

  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const colour = (name) => getComputedStyle(paper ? document.getElementById("paper") : document.documentElement).getPropertyValue(`--${name}`).trim();
  const ofRun = (number) => colour(`run-${number % 8}`);
  const faint = (hex, share) => hex + Math.round(255 * share).toString(16).padStart(2, "0");

  // Plotly interprets a few HTML tags in its texts, so escape the names of runs.
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;");

  function line(number, x, y, more) {
    const runColour = ofRun(number);
    return {
      type: "scatter", mode: x.length > 1 ? "lines" : "markers", x, y, name: plain(data.names[number]), showlegend: false,
      line: { color: runColour, width: 1.8, dash: DASHES[Math.floor(number / 8) % 5] }, marker: { color: runColour, size: 5 },
      hovertemplate: several ? "%{y:.4~g}" : "%{y:.4~g}<extra></extra>", ...more,
    };
  }

  function axis(title, more) {
    return {
      title: title ? { text: title, font: { size: 12 }, standoff: 6 } : undefined, gridcolor: faint(colour("line"), 0.7), zerolinecolor: colour("line"),
      zerolinewidth: 1, linecolor: colour("line"), tickfont: { size: 11 }, automargin: true, nticks: 6, exponentformat: "power", ...more,
    };
  }

  const steps = (title) => axis(title, { spikecolor: colour("edge"), spikethickness: 1, spikedash: "solid", unifiedhovertitle: { text: "step %{x}" } });

  function layout(more) {
    return {
      margin: MARGIN, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: colour("card"), hovermode: "x unified", showlegend: false,
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("muted") }, dragmode: touch.matches ? false : "zoom",
      hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink"), size: 12 }, namelength: 40 },
      xaxis: steps("step"), yaxis: axis(), ...more,
    };
  }

  const isOne = (points) => points.steps.length === 1;

  function curve(place) {
    const { group, curve: number } = place.dataset;
    const traces = data.curves[group][number].flatMap((points, run) => {
      if (!points) return [];
      const raw = line(run, points.steps, points.values, isOne(points) ? { mode: "markers" } : {});
      if (!points.trend) return [raw];
      raw.line = { color: faint(ofRun(run), 0.35), width: 1 };
      return [raw, line(run, points.trend.steps, points.trend.values, { hoverinfo: "skip", hovertemplate: undefined })];
    });
    const marks = data.marks[group][number];
    if (!several) return [traces, layout({ shapes: marks.flatMap(shade) })];
    const lanes = [...new Set(marks.filter((mark) => mark.shown).map((mark) => mark.run))];
    return [traces, layout({ shapes: marks.flatMap((mark) => bar(mark, lanes)), margin: { ...MARGIN, t: MARGIN.t + 6 * lanes.length } })];
  }

  const stretch = (from, to, more) => ({ type: "rect", xref: "x", yref: "paper", x0: from, x1: to, y0: 0, y1: 1, line: { width: 0 }, layer: "below", ...more });

  // One run: shade the steps of findings that rest on the metric, and mark the beginning of every finding.
  function shade(mark) {
    const severityColour = colour(mark.severity);
    const foot = { type: "line", xref: "x", yref: "paper", x0: mark.first, x1: mark.first, y0: 0, y1: 0.07, line: { color: severityColour, width: 2 } };
    return mark.shown ? [stretch(mark.first, mark.last, { fillcolor: faint(severityColour, 0.1) }), foot] : [foot];
  }

  // Several runs: a lane above the plot for each run with a finding on this metric.
  function bar(mark, lanes) {
    const top = 1.03 + 0.035 * lanes.indexOf(mark.run);
    return mark.shown ? [stretch(mark.first, mark.last, { y0: top, y1: top + 0.025, fillcolor: ofRun(mark.run) })] : [];
  }

  const distance = (kl) => (root ? Math.sqrt(Math.max(kl, 0)) : kl);

  function frontier(place) {
    const panel = data.frontier[place.dataset.panel];
    const unit = root ? "√KL" : "KL";
    const shapes = [];
    const traces = panel.runs.flatMap((points, run) => {
      if (!points) return [];
      const runColour = ofRun(run);
      const x = points.kl.map(distance);
      const lines = [line(run, x, points.score, {
        mode: "lines+markers", line: { color: faint(runColour, 0.45), width: 1.2, dash: "solid" }, marker: { color: x.map((_, at) => faint(runColour, 0.25 + 0.75 * at / Math.max(x.length - 1, 1))), size: x.map((_, at) => (at === x.length - 1 ? 11 : 5)) }, customdata: points.steps.map((step, at) => [step, points.kl[at]]),
        hovertemplate: "step %{customdata[0]}: %{y:.4~g} at %{customdata[1]:.3~g} nats" + (several ? "" : "<extra></extra>"),
      })];
      if (points.form) lines.push(line(run, points.form.kl.map(distance), points.form.score, { mode: "lines", line: { color: runColour, width: 1.2, dash: "dash" }, opacity: 0.8, hoverinfo: "skip", hovertemplate: undefined }));
      if (points.peak !== null) {
        if (!several) shapes.push(stretch(x[points.peak], Math.max(...x), { fillcolor: faint(colour("critical"), 0.08) }));
        lines.push(line(run, [x[points.peak]], [points.score[points.peak]], { mode: "markers+text", marker: { color: runColour, size: 11, symbol: "triangle-down" }, text: [several ? "" : "highest"], textposition: "top center", hoverinfo: "skip", hovertemplate: undefined, cliponaxis: false }));
      }
      return lines;
    });
    return [traces, layout({ shapes, hovermode: "closest", margin: { ...MARGIN, r: 14, t: 18 }, xaxis: axis(`${unit} to the reference, nats${root ? "<sup>½</sup>" : ""}`) })];
  }

  function spread(place) {
    const traces = data.spread.flatMap((metrics, run) => {
      const bands = metrics[place.dataset.figure];
      if (!bands) return [];
      const band = (low, high, share) => [
        line(run, bands.steps, bands.quantiles[low], { mode: "lines", line: { width: 0 }, hoverinfo: "skip", hovertemplate: undefined }),
        line(run, bands.steps, bands.quantiles[high], { mode: "lines", line: { width: 0 }, fill: "tonexty", fillcolor: faint(ofRun(run), share), hoverinfo: "skip", hovertemplate: undefined }),
      ];
      const hover = several ? "%{y:.4~g}" : "median %{y:.4~g}<br>half: %{customdata[0]:.3~g} to %{customdata[1]:.3~g}<extra></extra>";
      const middle = line(run, bands.steps, bands.quantiles[2], { customdata: bands.steps.map((_, at) => [bands.quantiles[1][at], bands.quantiles[3][at]]), hovertemplate: hover });
      return [...(several ? [] : band(0, 4, 0.13)), ...band(1, 3, several ? 0.16 : 0.24), middle];
    });
    return [traces, layout({})];
  }

  const KINDS = { curve, frontier, spread };
  const drawn = new Set();

  function draw(place) {
    const [traces, shape] = KINDS[place.dataset.plot](place);
    drawn.add(place);
    Plotly.react(place, traces, shape, { displayModeBar: false, responsive: true });
  }

  const again = (places) => places.forEach(draw);
  const isOpen = (place) => place.offsetParent !== null;

  // Draw one plot at a time, so that the page stays responsive: visible plots at once, then the nearest when idle.
  const whenIdle = (job) => (window.requestIdleCallback ? requestIdleCallback(job, { timeout: 200 }) : setTimeout(job, 50));
  let drawing = false;

  function away(place) {
    const { top, bottom } = place.getBoundingClientRect();
    return Math.max(0, top - innerHeight, -bottom);
  }

  function drawNext() {
    const left = all("[data-plot]").filter((place) => !drawn.has(place) && isOpen(place)).map((place) => [away(place), place]);
    left.sort(([one], [other]) => one - other);
    if (left.length) draw(left[0][1]);
    drawing = left.length > 1;
    if (drawing) (left[1][0] ? whenIdle : requestAnimationFrame)(drawNext);
  }

  function drawAll() {
    if (!drawing && window.Plotly) drawNext(); // an open group fires its toggle event before Plotly is loaded
  }

  addEventListener("load", drawAll); // Plotly is the last script, because it is long
  all(".group").forEach((group) => group.addEventListener("toggle", drawAll));
  dark.addEventListener("change", () => again([...drawn]));
  addEventListener("beforeprint", () => { paper = true; all("details").forEach((part) => { part.open = true; }); again(all("[data-plot]").filter(isOpen)); });
  addEventListener("afterprint", () => { paper = false; again([...drawn]); });

  document.getElementById("open-all")?.addEventListener("click", (event) => {
    all(".group").forEach((group) => { group.open = true; });
    event.currentTarget.parentElement.remove();
  });

  document.getElementById("axis")?.addEventListener("click", (event) => {
    root = !root;
    event.currentTarget.setAttribute("aria-pressed", String(root));
    again([...drawn].filter((place) => place.dataset.plot === "frontier"));
  });

  // ---- the token view

  const view = document.getElementById("token-view");
  const shown = { response: 0, channel: "" };

  const press = (buttons, is) => buttons.forEach((button) => button.setAttribute("aria-pressed", String(is(button))));

  function show() {
    const row = data.tokens[shown.response];
    const channels = keelTokens.channels(row);
    if (!channels.includes(shown.channel)) shown.channel = channels[0] ?? "";
    press(all("[data-response]"), (button) => Number(button.dataset.response) === shown.response);
    all("[data-about]").forEach((about) => { about.hidden = Number(about.dataset.about) !== shown.response; });
    document.getElementById("channels").replaceChildren(...channels.map(channelButton));
    if (shown.channel) keelTokens.render(view, row, shown.channel);
    else view.textContent = "The run logged no values for the tokens of this response.";
  }

  function channelButton(channel) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = channel;
    button.dataset.channel = channel;
    button.setAttribute("aria-pressed", String(channel === shown.channel));
    button.addEventListener("click", () => {
      shown.channel = channel;
      show();
      document.querySelector(`[data-channel="${channel}"]`).focus();
    });
    return button;
  }

  if (view) {
    all("[data-response]").forEach((button) => button.addEventListener("click", () => { shown.response = Number(button.dataset.response); show(); }));
    show();
  }
})();
