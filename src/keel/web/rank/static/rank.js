// The page of one item: its state, and the effect of each key, button and drag.

import * as cards from "./cards.js";
import { draggable } from "./drag.js";
import { fold } from "./fold.js";
import { listen } from "./keys.js";
import * as order from "./order.js";
import { isBusy, send, undo } from "./send.js";
import { describe, missing } from "./phrases.js";

const { deal, csrf, previous } = document.querySelector("main").dataset;
const { count } = cards;
const two = count === 2;
const comment = document.getElementById("comment");
const remarks = document.querySelector(".remarks");
const tagBoxes = [...document.querySelectorAll(".tag input")];
const texts = [...document.querySelectorAll(".prompt .text, .card .text")].map((text) => text.textContent);
fold(document.querySelectorAll(".prompt .text, .card .text"));
const draftName = JSON.stringify([csrf, texts]); // the same for this rater and item when it is dealt again after an undo

// `history` holds `places` and `cannot` before each step.
const state = { places: [], cannot: false, comment: "", tags: [], seconds: 0, history: [] };

const left = () => count - state.places.flat().length;
const complete = () => state.cannot || !left();
const say = (text) => (document.getElementById("message").textContent = text);

// ---- the state on the page

function draw() {
  cards.draw(state.places);
  document.body.classList.toggle("cannot", state.cannot);
  press("cannot", state.cannot);
  for (const [command, [places]] of Object.entries(CHOICES)) press(command, same(places, state.places));
  document.querySelector("[data-command=submit]").setAttribute("aria-disabled", !complete());
  const chain = state.places.map((place) => place.map((response) => response + 1).join(" = ")).join(" › ");
  document.getElementById("order").textContent = state.cannot || two ? "" : chain;
}

function press(command, pressed) {
  document.querySelector(`.actions [data-command=${command}]`)?.setAttribute("aria-pressed", pressed);
}

const same = (places, others) => JSON.stringify(places) === JSON.stringify(others);

function change(next, text) {
  state.history.push({ places: state.places, cannot: state.cannot });
  Object.assign(state, { cannot: false }, next);
  draw();
  say(text);
  keep();
}

function rank(places, response) {
  if (same(places, state.places) && !state.cannot) return say(describe(places, response, count));
  const last = places.flat().length === count ? ` ${missing(0)}` : "";
  change({ places }, describe(places, response, count) + last);
}

// ---- the draft, which stays in this tab until it is submitted, so that neither a reload nor an undo loses it

function keep() {
  sessionStorage.setItem(draftName, JSON.stringify({ ...state, deal }));
}

function restore() {
  const draft = JSON.parse(sessionStorage.getItem(draftName));
  const submitted = JSON.parse(previous);
  if (draft && (draft.deal === deal || !submitted)) Object.assign(state, draft);
  else if (submitted) {
    const { ranks, comment, tags } = submitted;
    Object.assign(state, { places: order.fromRanks(ranks ?? []), cannot: ranks === null, comment, tags });
  }
  comment.value = state.comment;
  for (const box of tagBoxes) box.checked = state.tags.includes(box.value);
  remarks.open = Boolean(state.comment || state.tags.length);
}

function readRemarks() {
  state.comment = comment.value;
  state.tags = tagBoxes.filter((box) => box.checked).map((box) => box.value);
  keep();
}

// ---- the time for which the page was visible

let since = performance.now();

function countTime() {
  const now = performance.now();
  if (document.visibilityState === "hidden") state.seconds += (now - since) / 1000;
  since = now;
  if (!isBusy()) keep();
}

const seconds = () => state.seconds + (performance.now() - since) / 1000;

// ---- commands; `response` counts from 0

const CHOICES = {
  first: [[[0], [1]], "The first is better."],
  equal: [[[0, 1]], "A tie."],
  second: [[[1], [0]], "The second is better."],
};

function move(response, by) {
  rank(order.move(state.places, response, by), response);
  cards.follow(response);
}

const isPlaced = (response) => order.placeOf(state.places, response) >= 0;

const commands = {
  place: (response) => rank((isPlaced(response) ? order.without : order.append)(state.places, response), response),
  out: (response) => rank(order.without(state.places, response), response),
  up: (response) => move(response, -1),
  down: (response) => move(response, 1),
  tie: (response) => rank(order.toggleTie(state.places, response), response),
  tieWithLast(response) {
    const rest = order.without(state.places, response);
    rank(rest.length ? order.tieWith(rest, response, rest.at(-1)[0]) : order.append(rest, response), response);
  },
  cannot() {
    const text = state.cannot ? missing(left()) : "Marked as: cannot judge. You can submit.";
    change({ cannot: !state.cannot }, text);
  },
  back() {
    if (!state.history.length) return say("There is no step to undo.");
    Object.assign(state, state.history.pop());
    draw();
    keep();
    say(`Undid one step. ${missing(left())}`);
  },
  comment() {
    remarks.open = true;
    comment.focus();
  },
  submit() {
    if (!complete()) return say(missing(left()));
    const { comment, tags } = state;
    const ranks = state.cannot ? null : order.toRanks(state.places, count);
    const sent = () => sessionStorage.removeItem(draftName);
    send("/judgements", { deal, ranks, comment, tags, seconds: seconds() }, { again: true, sent });
  },
  undo: () => document.querySelector("[data-command=undo]") && undo(),
  step(by) {
    const responses = cards.inPageOrder();
    const at = responses.indexOf(cards.focused());
    const next = at < 0 && by < 0 ? count - 1 : Math.min(Math.max(at + by, 0), count - 1);
    cards.follow(responses[next]);
  },
  announceTie: () => say("Tie with the last response placed: press the number of a response."),
  keys: () => show("keys"),
};
for (const [command, [places, text]] of Object.entries(CHOICES)) {
  commands[command] = () => change({ places }, `${text} You can submit.`);
}

// The kinds of drop are described in drag.js.
function drop(card, target) {
  const response = cards.responseOf(card);
  const { places } = state;
  const other = target.card?.matches(".card") ? cards.responseOf(target.card) : null;
  const result = {
    out: () => order.without(places, response),
    into: () => order.append(places, response),
    after: () => order.append(places, response),
    onto: () => order.tieWith(places, response, other),
    before: () => order.before(places, response, other),
  }[target.kind]();
  rank(result, response);
  cards.follow(response);
}

// ---- wiring

const show = (id) => document.getElementById(id).showModal();

function onClick(event) {
  const control = event.target.closest("button, summary");
  if (!control) return;
  const { command, opens } = control.dataset;
  const card = control.closest(".card");
  if (opens) show(opens);
  else if (command) commands[command](card && cards.responseOf(card));
  else control.closest("dialog")?.close();
  if (event.detail && !opens) leave(card); // a click by mouse, not by keyboard
}

// Move the focus away after a click, so that Enter submits and does not press the same button again.
function leave(card) {
  if (card) card.focus({ preventScroll: true });
  else document.activeElement.blur();
}

restore();
draw();
if (!two) for (const card of cards.all) draggable(card, drop);
listen(commands, { two, count, focused: cards.focused });
document.addEventListener("click", onClick);
document.addEventListener("visibilitychange", countTime);
remarks.addEventListener("input", readRemarks);
say(complete() ? missing(0) : "");
