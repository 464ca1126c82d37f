// The response cards: the list that each is in, its label, and its buttons.

import { placeOf } from "./order.js";
import { label } from "./phrases.js";

const cards = [...document.querySelectorAll(".card")];
const ranked = document.getElementById("ranked");
const pool = document.querySelector("#pool .cards");
const still = matchMedia("(prefers-reduced-motion: reduce)");

export const count = cards.length;
export const all = cards;
export const responseOf = (element) => Number(element.closest(".card").dataset.response);
export const inPageOrder = () => [...document.querySelectorAll(".card")].map(responseOf);

// The response whose card, or a button on it, has the focus; null if there is none.
export function focused() {
  const card = document.activeElement.closest(".card");
  return card && responseOf(card);
}

export function follow(response) {
  if (focused() !== response) cards[response].focus({ preventScroll: true });
  cards[response].scrollIntoView({ block: "nearest", behavior: still.matches ? "instant" : "smooth" });
}

// Make these the items of a list, in this order. Items already in place are not moved, so they keep the focus.
function fill(list, items) {
  items.forEach((item, at) => {
    if (list.children[at] !== item) list.insertBefore(item, list.children[at] ?? null);
  });
}

// Animate cards from their previous positions (the FLIP technique: first, last, invert, play).
function glide(cards, change) {
  const previousTops = cards.map((card) => card.getBoundingClientRect().top);
  change();
  if (still.matches) return;
  cards.forEach((card, i) => {
    const by = previousTops[i] - card.getBoundingClientRect().top;
    if (by) card.animate([{ translate: `0 ${by}px` }, { translate: "0" }], { duration: 180, easing: "ease-out" });
  });
}

function updateCard(card, places) {
  const response = responseOf(card);
  const at = placeOf(places, response);
  card.querySelector(".place").textContent = label(places, response, count);
  card.dataset.place = at < 0 ? "" : at + 1;
  card.parentElement.classList.toggle("joined", at >= 0 && places[at][0] !== response);
  const where = at < 0 ? "pool" : "ranked";
  for (const button of card.querySelectorAll("[data-when]")) button.hidden = button.dataset.when !== where;
  updateTieButton(card.querySelector("[data-command=tie]"), places, at);
}

function updateTieButton(button, places, at) {
  if (!button) return; // pages with two responses have a separate tie button
  const tied = places[at]?.length > 1;
  button.setAttribute("aria-pressed", tied);
  button.hidden = !tied && (at === 0 || !places.length);
}

export function draw(places) {
  const active = document.activeElement;
  const order = places.flat();
  const items = (responses) => responses.map((response) => cards[response].parentElement);
  glide(cards, () => {
    if (ranked) fill(ranked, items(order));
    if (pool) fill(pool, items(cards.map(responseOf).filter((response) => !order.includes(response))));
    for (const card of cards) updateCard(card, places);
  });
  for (const list of [ranked, pool]) list?.parentElement.classList.toggle("bare", !list.children.length);
  restoreFocus(active);
}

// Restore the focus, which an element loses when it is moved. If its button is now hidden, focus the card.
function restoreFocus(active) {
  if (document.activeElement !== active) active.focus({ preventScroll: true });
  if (document.activeElement !== active) active.closest(".card")?.focus({ preventScroll: true });
}
