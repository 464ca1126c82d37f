// Tracking of visible charts. A page has dozens, and only those on the screen or near it are drawn.

const byPlot = new WeakMap();
const visible = new WeakSet();
const waiting = new Set(); // charts to draw in the next frame

export const isVisible = (chart) => visible.has(chart);

export function requestDraw(chart) {
  if (!waiting.size) requestAnimationFrame(drawWaiting);
  waiting.add(chart);
}

function drawWaiting() {
  for (const chart of waiting) chart.draw();
  waiting.clear();
}

const visibility = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      const chart = byPlot.get(target);
      visible[isIntersecting ? "add" : "delete"](chart);
      if (isIntersecting) requestDraw(chart);
    }
  },
  { rootMargin: "300px" },
);

const sizes = new ResizeObserver((entries) => {
  for (const { target, contentRect } of entries) {
    const chart = byPlot.get(target);
    chart.width = contentRect.width;
    chart.invalidate();
  }
});

export function watch(chart) {
  byPlot.set(chart.plot, chart);
  visibility.observe(chart.plot);
  sizes.observe(chart.plot);
}

export function unwatch(chart) {
  visibility.unobserve(chart.plot);
  sizes.unobserve(chart.plot);
}
