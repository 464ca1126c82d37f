// One response in full: prompt, text, scores, and the token view.

import { make, number } from "./dashboard_common.js";

let channel = "advantage"; // kept from one response to the next

export function scoreTiles(row) {
  const metrics = [["score", row.score], ["KL", row.kl], ["length", row.length], ["step", row.step]];
  const scores = Object.entries(row.scores ?? {});
  const list = make("dl", "tiles small-tiles");
  for (const [name, value] of metrics) list.append(make("div", "", make("dt", "", name), make("dd", "", name === "step" ? String(value) : number(value))));
  // The score of a single scorer is shown only if it differs from the combined score.
  const shown = scores.length > 1 || scores.some(([, value]) => value !== row.score) ? scores : [];
  for (const [name, value] of shown) list.append(make("div", "by-scorer", make("dt", "", `by ${name}`), make("dd", "", number(value))));
  if (row.truncated) list.append(make("div", "cut", make("dt", "", "no end token"), make("dd", "", "truncated")));
  return list;
}

export function tokenView(row) {
  const names = keelTokens.channels(row);
  if (!names.length) return make("p", "muted small", "This run logged no values per token.");
  const view = make("div");
  const buttons = names.map((name) => {
    const button = make("button", "tab", name);
    button.type = "button";
    button.addEventListener("click", () => show(name));
    return button;
  });
  function show(name) {
    for (const button of buttons) button.setAttribute("aria-pressed", button.textContent === name);
    keelTokens.render(view, row, name);
  }
  const tabs = make("div", "tabs", ...buttons);
  tabs.setAttribute("role", "group");
  tabs.setAttribute("aria-label", "Colour the tokens by");
  tabs.addEventListener("click", (event) => event.target.closest("button") && (channel = event.target.textContent));
  show(names.includes(channel) ? channel : names[0]);
  return make("div", "token-view", tabs, view);
}

export function text(content, name = "") {
  const element = make("div", `text panel ${name}`, content);
  element.dir = "auto";
  return element;
}

// Make a text that may be long scrollable by keyboard.
function scrolling(element, name) {
  element.tabIndex = 0;
  element.setAttribute("role", "region");
  element.setAttribute("aria-label", name);
  return element;
}

// A conversation by turns with their roles; any other prompt as plain text.
export function promptElement(prompt, turns) {
  if (!turns?.length) return scrolling(text(prompt, "prompt-text"), "Prompt");
  const turn = ({ role, kind, text: words }) => make("div", `turn ${kind}`, make("h4", "", role), words ? text(words) : make("p", "muted small", "This turn is empty."));
  return scrolling(make("div", "prompt-text turns", ...turns.map(turn)), "Conversation");
}

export function drawResponse(drawer, { row, prompt, turns }, close) {
  const button = make("button", "quiet", "Close");
  button.addEventListener("click", close);
  drawer.replaceChildren(
    make("header", "title", make("h2", "", `Response at step ${row.step}`), button),
    scoreTiles(row),
    make("h3", "", "Prompt"),
    promptElement(prompt, turns),
    make("h3", "", "Response"),
    text(String(row.response)),
    make("h3", "", "Token by token"),
    tokenView(row),
  );
  drawer.hidden = false;
}
