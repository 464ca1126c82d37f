// The cards on the page: which list each stands in, what is written on it, and which buttons it has.

import { placeOf } from "./order.js";
import { label } from "./phrases.js";

const cards = [...document.querySelectorAll(".card")];
const ranked = document.getElementById("ranked");
const pool = document.querySelector("#pool .cards");
const still = matchMedia("(prefers-reduced-motion: reduce)");

export const count = cards.length;
export const all = cards;
export const answerOf = (element) => Number(element.closest(".card").dataset.answer);
export const inOrder = () => [...document.querySelectorAll(".card")].map(answerOf); // as they stand on the page

// The answer whose card, or a button on it, has the focus; null where there is none.
export function focused() {
  const card = document.activeElement.closest(".card");
  return card && answerOf(card);
}

export function follow(answer) {
  if (focused() !== answer) cards[answer].focus({ preventScroll: true });
  cards[answer].scrollIntoView({ block: "nearest", behavior: still.matches ? "instant" : "smooth" });
}

// The items of a list become exactly these, in this order; one that stands right is not touched, so it keeps the focus.
function fill(list, items) {
  items.forEach((item, at) => {
    if (list.children[at] !== item) list.insertBefore(item, list.children[at] ?? null);
  });
}

// Cards glide from where they were (the FLIP technique: first, last, invert, play).
function glide(cards, change) {
  const before = cards.map((card) => card.getBoundingClientRect().top);
  change();
  if (still.matches) return;
  cards.forEach((card, i) => {
    const by = before[i] - card.getBoundingClientRect().top;
    if (by) card.animate([{ translate: `0 ${by}px` }, { translate: "0" }], { duration: 180, easing: "ease-out" });
  });
}

function write(card, places) {
  const answer = answerOf(card);
  const at = placeOf(places, answer);
  card.querySelector(".place").textContent = label(places, answer, count);
  card.dataset.place = at < 0 ? "" : at + 1;
  card.parentElement.classList.toggle("joined", at >= 0 && places[at][0] !== answer);
  const where = at < 0 ? "pool" : "ranked";
  for (const button of card.querySelectorAll("[data-when]")) button.hidden = button.dataset.when !== where;
  writeTie(card.querySelector("[data-command=tie]"), places, at);
}

function writeTie(button, places, at) {
  if (!button) return; // two answers are tied by a button of their own
  const tied = places[at]?.length > 1;
  button.setAttribute("aria-pressed", tied);
  button.hidden = !tied && (at === 0 || !places.length);
}

export function draw(places) {
  const active = document.activeElement;
  const order = places.flat();
  const items = (answers) => answers.map((answer) => cards[answer].parentElement);
  glide(cards, () => {
    if (ranked) fill(ranked, items(order));
    if (pool) fill(pool, items(cards.map(answerOf).filter((answer) => !order.includes(answer))));
    for (const card of cards) write(card, places);
  });
  for (const list of [ranked, pool]) list?.parentElement.classList.toggle("bare", !list.children.length);
  holdFocus(active);
}

// An element that moves in the page loses the focus, and a button that vanished cannot have it: then its card has.
function holdFocus(active) {
  if (document.activeElement !== active) active.focus({ preventScroll: true });
  if (document.activeElement !== active) active.closest(".card")?.focus({ preventScroll: true });
}
