// One answer in full: prompt, text, scores, and the token view.

import { make, number } from "./dashboard_common.js";

let channel = "advantage"; // stays from answer to answer

export function scoresOf(row) {
  const own = [["score", row.score], ["KL", row.kl], ["length", row.length], ["step", row.step]];
  const parts = Object.entries(row.scores ?? {});
  const list = make("dl", "tiles small-tiles");
  for (const [name, value] of own) list.append(make("div", "", make("dt", "", name), make("dd", "", name === "step" ? String(value) : number(value))));
  const by = parts.length > 1 || parts.some(([, value]) => value !== row.score) ? parts : [];
  for (const [name, value] of by) list.append(make("div", "by-scorer", make("dt", "", `by ${name}`), make("dd", "", number(value))));
  if (row.truncated) list.append(make("div", "cut", make("dt", "", "no end token"), make("dd", "", "cut")));
  return list;
}

export function tokenView(row) {
  const names = keelTokens.channels(row);
  if (!names.length) return make("p", "muted small", "This run kept no figures of single tokens.");
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

// What may be long scrolls, so it can be reached by keyboard.
function scrolling(element, name) {
  element.tabIndex = 0;
  element.setAttribute("role", "region");
  element.setAttribute("aria-label", name);
  return element;
}

// A conversation turn by turn, under its roles; any other prompt as it is.
export function promptOf(prompt, turns) {
  if (!turns?.length) return scrolling(text(prompt, "prompt-text"), "Prompt");
  const turn = ({ role, kind, text: words }) => make("div", `turn ${kind}`, make("h4", "", role), words ? text(words) : make("p", "muted small", "This turn is empty."));
  return scrolling(make("div", "prompt-text turns", ...turns.map(turn)), "Conversation");
}

export function drawAnswer(drawer, { row, prompt, turns }, close) {
  const button = make("button", "quiet", "Close");
  button.addEventListener("click", close);
  drawer.replaceChildren(
    make("header", "title", make("h2", "", `An answer of step ${row.step}`), button),
    scoresOf(row),
    make("h3", "", "Prompt"),
    promptOf(prompt, turns),
    make("h3", "", "Answer"),
    text(String(row.response)),
    make("h3", "", "Token by token"),
    tokenView(row),
  );
  drawer.hidden = false;
}
