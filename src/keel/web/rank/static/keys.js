// Keyboard commands. Keys have no effect inside a text box or a dialog, and can be switched off (WCAG 2.1.4).

import { isBusy } from "./send.js";

const setting = document.getElementById("single-keys");
const NAME = "keel single keys";

// The number on a digit key, in any keyboard layout and with or without Shift; 0 for any other key.
function digit(event) {
  const key = /^(?:Digit|Numpad)([1-9])$/.exec(event.code)?.[1] ?? event.key;
  const moves = event.code.startsWith("Numpad") && !/^[1-9]$/.test(event.key) && !event.shiftKey; // with NumLock off, these are arrows
  return !moves && /^[1-9]$/.test(key) ? Number(key) : 0;
}

const COMMON = { Backspace: "back", x: "cannot", u: "undo", c: "comment", "?": "keys" };
const TWO = { 1: "first", 2: "second", 3: "equal", "=": "equal", ArrowLeft: "first", ArrowRight: "second" };
let tieNext = false; // "=" was pressed, which acts as Shift for the next digit

function two(event, commands) {
  const command = TWO[digit(event) || event.key];
  if (command) commands[command]();
  return Boolean(command);
}

function many(event, commands, { count, focused }) {
  const number = digit(event);
  const ties = event.shiftKey || tieNext;
  if (event.key !== "Shift") tieNext = event.key === "=";
  if (tieNext) commands.announceTie();
  else if (number) {
    if (number <= count) commands[ties ? "tieWithLast" : "place"](number - 1);
  } else if (event.key === "ArrowUp") commands.step(-1);
  else if (event.key === "ArrowDown") commands.step(1);
  else if (event.key === "t" && focused() !== null) commands.tie(focused());
  else return false;
  return true;
}

function common(event, commands) {
  const command = COMMON[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (command) commands[command]();
  return Boolean(command);
}

// Alt with an arrow moves a card. Other keys with Alt, Ctrl or Meta are left to the browser.
function withAlt(event, commands, { two, focused }) {
  const by = { ArrowUp: "up", ArrowDown: "down" }[event.key];
  if (!by || two || focused() === null) return false;
  commands[by](focused());
  return true;
}

function onKey(event, commands, page) {
  if (isBusy()) return;
  const inText = event.target.closest("textarea");
  if (event.key === "Enter") return onEnter(event, commands, inText);
  if (inText && event.key === "Escape") inText.blur();
  if (inText || event.target.closest("dialog") || event.ctrlKey || event.metaKey || !setting.checked) return;
  const done = event.altKey
    ? withAlt(event, commands, page)
    : (page.two ? two : many)(event, commands, page) || common(event, commands);
  if (done) event.preventDefault();
}

// Enter submits, except on an element that handles Enter. In the comment it starts a new line, and Ctrl+Enter submits.
function onEnter(event, commands, inText) {
  const handlesEnter = event.target.closest("button, summary, dialog, a");
  if (handlesEnter || event.repeat || (inText && !event.ctrlKey && !event.metaKey)) return;
  event.preventDefault();
  commands.submit();
}

export function listen(commands, page) {
  setting.checked = localStorage.getItem(NAME) !== "off";
  setting.addEventListener("change", () => localStorage.setItem(NAME, setting.checked ? "on" : "off"));
  document.addEventListener("keydown", (event) => onKey(event, commands, page));
}
