// Dragging by mouse, pen or finger. A card is lifted by its head, or by its grip on a touch screen. It is dropped
// between two ranked cards (a place of its own), onto one (a tie), or outside (not ranked).

const THRESHOLD = 5; // pixels of movement that turn a press into a drag
const EDGE = 72; // pixels at the top and bottom in which the page scrolls while dragging
const SCROLL = 14; // pixels per frame

const ghost = document.getElementById("ghost");
const bar = document.querySelector(".actions");
let drag = null; // { card, id, x, y, lifted, target }

// The effect of a drop at height y: { kind: "before" | "onto" | "after" | "into" | "out", card }.
function targetAt(y, card) {
  const ranked = document.getElementById("ranked");
  const others = [...ranked.querySelectorAll(".card")].filter((other) => other !== card);
  const pool = document.getElementById("pool");
  if (pool.getBoundingClientRect().top <= y) return { kind: "out" };
  if (!others.length) return { kind: "into", card: ranked };
  for (const other of others) {
    const { top, height } = other.getBoundingClientRect();
    if (y < top + 0.28 * height) return { kind: "before", card: other };
    if (y < top + 0.72 * height) return { kind: "onto", card: other };
  }
  return { kind: "after", card: others.at(-1) };
}

function mark(target) {
  if (drag.target?.card) delete drag.target.card.dataset.drop;
  if (target?.card) target.card.dataset.drop = target.kind;
  drag.target = target;
}

// Cards shrink while one is dragged (style.css), so that the entire ranking is within reach. The page is then scrolled
// so that the lifted card stays under the pointer.
function lift() {
  drag.lifted = true;
  ghost.textContent = drag.card.querySelector(".name").textContent;
  const previousTop = drag.card.getBoundingClientRect().top;
  document.body.classList.add("sorting");
  drag.card.classList.add("lifted");
  ghost.hidden = false;
  scrollBy({ top: drag.card.getBoundingClientRect().top - previousTop, behavior: "instant" });
  requestAnimationFrame(scroll);
}

function follow() {
  ghost.style.translate = `${drag.x}px ${drag.y}px`;
  mark(targetAt(drag.y, drag.card));
}

function scroll() {
  if (!drag?.lifted) return;
  const bottom = bar.getBoundingClientRect().top;
  const by = drag.y < EDGE ? -SCROLL : drag.y > bottom - EDGE ? SCROLL : 0;
  if (by) {
    scrollBy({ top: by, behavior: "instant" });
    follow();
  }
  requestAnimationFrame(scroll);
}

function finish(drop) {
  if (!drag) return;
  const { card, lifted, target } = drag;
  mark(null);
  drag = null;
  ghost.hidden = true;
  document.body.classList.remove("sorting");
  card.classList.remove("lifted");
  if (lifted && target) drop?.(card, target);
}

// Make a card draggable. `drop(card, target)` is called after each completed drag.
export function draggable(card, drop) {
  const head = card.querySelector(".head");
  head.addEventListener("pointerdown", (event) => {
    const grip = event.target.closest(".grip");
    if (event.button || event.target.closest("button") || (event.pointerType === "touch" && !grip)) return;
    drag = { card, x: event.clientX, y: event.clientY, fromX: event.clientX, fromY: event.clientY, lifted: false };
    head.setPointerCapture(event.pointerId);
  });
  head.addEventListener("pointermove", (event) => {
    if (drag?.card !== card) return;
    drag.x = event.clientX;
    drag.y = event.clientY;
    if (!drag.lifted && Math.hypot(drag.x - drag.fromX, drag.y - drag.fromY) < THRESHOLD) return;
    if (!drag.lifted) lift();
    follow();
  });
  head.addEventListener("pointerup", () => finish(drop));
  head.addEventListener("pointercancel", () => finish(null));
}

addEventListener("keydown", (event) => event.key === "Escape" && finish(null));
