// Only the charts that are on the screen, or near it, are drawn: a page has dozens.

const byPlot = new WeakMap();
const seen = new WeakSet();
const waiting = new Set(); // to be drawn in the next frame

export const isSeen = (chart) => seen.has(chart);

export function requestDraw(chart) {
  if (!waiting.size) requestAnimationFrame(drawWaiting);
  waiting.add(chart);
}

function drawWaiting() {
  for (const chart of waiting) chart.draw();
  waiting.clear();
}

const sight = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      const chart = byPlot.get(target);
      seen[isIntersecting ? "add" : "delete"](chart);
      if (isIntersecting) requestDraw(chart);
    }
  },
  { rootMargin: "300px" },
);

const sizes = new ResizeObserver((entries) => {
  for (const { target, contentRect } of entries) {
    const chart = byPlot.get(target);
    chart.width = contentRect.width;
    chart.renew();
  }
});

export function watch(chart) {
  byPlot.set(chart.plot, chart);
  sight.observe(chart.plot);
  sizes.observe(chart.plot);
}

export function unwatch(chart) {
  sight.unobserve(chart.plot);
  sizes.unobserve(chart.plot);
}
