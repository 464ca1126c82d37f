// The page of one item: what the rater did so far, and what each key, button and drag does to it.

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
const draftName = JSON.stringify([csrf, texts]); // of this rater and item, also when it is dealt again after an undo

// `history`: what `places` and `cannot` were before each step.
const state = { places: [], cannot: false, comment: "", tags: [], seconds: 0, history: [] };

const left = () => count - state.places.flat().length;
const complete = () => state.cannot || !left();
const say = (text) => (document.getElementById("said").textContent = text);

// ---- the state on the page

function draw() {
  cards.draw(state.places);
  document.body.classList.toggle("cannot", state.cannot);
  press("cannot", state.cannot);
  for (const [command, [places]] of Object.entries(CHOICES)) press(command, same(places, state.places));
  document.querySelector("[data-command=submit]").setAttribute("aria-disabled", !complete());
  const chain = state.places.map((place) => place.map((answer) => answer + 1).join(" = ")).join(" › ");
  document.getElementById("order").textContent = state.cannot || two ? "" : chain;
}

function press(command, pressed) {
  document.querySelector(`.actions [data-command=${command}]`)?.setAttribute("aria-pressed", pressed);
}

const same = (places, others) => JSON.stringify(places) === JSON.stringify(others);

function change(next, said) {
  state.history.push({ places: state.places, cannot: state.cannot });
  Object.assign(state, { cannot: false }, next);
  draw();
  say(said);
  keep();
}

function rank(places, answer) {
  if (same(places, state.places) && !state.cannot) return say(describe(places, answer, count));
  const last = places.flat().length === count ? ` ${missing(0)}` : "";
  change({ places }, describe(places, answer, count) + last);
}

// ---- neither a reload nor an undo loses anything: the draft stays in this tab until it is submitted

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

// ---- the time that the page was visible

let since = performance.now();

function countTime() {
  const now = performance.now();
  if (document.visibilityState === "hidden") state.seconds += (now - since) / 1000;
  since = now;
  if (!isBusy()) keep();
}

const seconds = () => state.seconds + (performance.now() - since) / 1000;

// ---- what a rater can do; `answer` counts from 0

const CHOICES = {
  first: [[[0], [1]], "The first is better."],
  equal: [[[0, 1]], "A tie."],
  second: [[[1], [0]], "The second is better."],
};

function move(answer, by) {
  rank(order.move(state.places, answer, by), answer);
  cards.follow(answer);
}

const isPlaced = (answer) => order.placeOf(state.places, answer) >= 0;

const commands = {
  place: (answer) => rank((isPlaced(answer) ? order.without : order.append)(state.places, answer), answer),
  out: (answer) => rank(order.without(state.places, answer), answer),
  up: (answer) => move(answer, -1),
  down: (answer) => move(answer, 1),
  tie: (answer) => rank(order.toggleTie(state.places, answer), answer),
  tieWithLast(answer) {
    const rest = order.without(state.places, answer);
    rank(rest.length ? order.tieWith(rest, answer, rest.at(-1)[0]) : order.append(rest, answer), answer);
  },
  cannot() {
    const said = state.cannot ? missing(left()) : "You cannot judge this one; you can submit that.";
    change({ cannot: !state.cannot }, said);
  },
  back() {
    if (!state.history.length) return say("There is no step to take back.");
    Object.assign(state, state.history.pop());
    draw();
    keep();
    say(`One step back. ${missing(left())}`);
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
    const answers = cards.inOrder();
    const at = answers.indexOf(cards.focused());
    const next = at < 0 && by < 0 ? count - 1 : Math.min(Math.max(at + by, 0), count - 1);
    cards.follow(answers[next]);
  },
  announceTie: () => say("A tie with the last one placed: press the number of the answer."),
  keys: () => show("keys"),
};
for (const [command, [places, said]] of Object.entries(CHOICES)) {
  commands[command] = () => change({ places }, `${said} You can submit.`);
}

// A drop is a place, see drag.js.
function drop(card, target) {
  const answer = cards.answerOf(card);
  const { places } = state;
  const other = target.card?.matches(".card") ? cards.answerOf(target.card) : null;
  const result = {
    out: () => order.without(places, answer),
    into: () => order.append(places, answer),
    after: () => order.append(places, answer),
    onto: () => order.tieWith(places, answer, other),
    before: () => order.before(places, answer, other),
  }[target.kind]();
  rank(result, answer);
  cards.follow(answer);
}

// ---- wiring

const show = (id) => document.getElementById(id).showModal();

function onClick(event) {
  const control = event.target.closest("button, summary");
  if (!control) return;
  const { command, opens } = control.dataset;
  const card = control.closest(".card");
  if (opens) show(opens);
  else if (command) commands[command](card && cards.answerOf(card));
  else control.closest("dialog")?.close();
  if (event.detail && !opens) leave(card); // by mouse
}

// So that Enter after a click submits, and does not press the same button again.
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
