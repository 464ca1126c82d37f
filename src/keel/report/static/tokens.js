// The token view: the tokens of a response, coloured by their logged values. It creates text nodes only.
// keelTokens.channels(row) returns names, keelTokens.render(element, row, channel) draws. A row is from rollouts.jsonl.

const keelTokens = (() => {
  "use strict";

  const plain = { zero: 0, scaled: (value) => value, back: (scaled) => scaled };
  const ratio = { zero: 1, scaled: Math.log, back: Math.exp }; // a ratio of 1/2 is as far from 1 as a ratio of 2

  const difference = (one, other) => one && other && one.map((value, at) => numeric(value) - numeric(other[at]));

  // Channel -> the values of a row, their scale, and their meaning.
  const CHANNELS = {
    reward: [(row) => row.rewards, plain, "Reward of each token: its KL penalty, plus the score at the tokens that receive it."],
    kl: [(row) => difference(row.logprobs, row.ref_logprobs), plain, "Log-probability minus that of the reference. Above 0, the token is more likely under the policy."],
    value: [(row) => row.values, plain, "The critic's estimate of the return from this token on."],
    advantage: [(row) => row.advantages, plain, "Whether the token turned out better or worse than expected. The update raises the probability of tokens above 0."],
    ratio: [(row) => row.ratio, ratio, "Probability of the token after the update over that before it; 1 is unchanged."],
    logprob: [(row) => row.logprobs, plain, "Log-probability of the token when it was sampled. Far below 0, the token was unlikely."],
  };
  const meanings = Object.fromEntries(Object.entries(CHANNELS).map(([name, [, , meaning]]) => [name, meaning]));

  const numeric = (value) => (typeof value === "number" && Number.isFinite(value) ? value : NaN);

  function values(row, channel) {
    const numbers = CHANNELS[channel][0](row);
    return Array.isArray(numbers) ? numbers.map(numeric) : [];
  }

  const channels = (row) => Object.keys(CHANNELS).filter((channel) => values(row, channel).some(Number.isFinite));

  // Old runs logged the ids of tokens without their texts.
  const pieces = (row) => row.pieces ?? (row.tokens ?? []).map((token) => `[${token}]`);

  const visible = (piece) => piece.replace(/\r?\n/g, "↵\n").replace(/\t/g, "⇥\t") || "◌";

  function formatNumber(value) {
    if (!Number.isFinite(value)) return "none";
    const size = Math.abs(value);
    const text = size && (size < 0.001 || size >= 10000) ? value.toExponential(1) : String(Number(value.toPrecision(3)));
    return text.replace("-", "−");
  }

  function make(tag, name, text) {
    const element = document.createElement(tag);
    element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  // The share of full colour is a square root, so that small values show beside a large one. The legend uses the same rule.
  function colour(element, share) {
    element.classList.toggle("keel-more", share > 0);
    element.classList.toggle("keel-less", share < 0);
    element.style.setProperty("--keel-share", `${(100 * Math.sqrt(Math.abs(share) || 0)).toFixed(1)}%`);
  }

  function legend(most, scale) {
    const list = make("ol", "keel-legend");
    list.setAttribute("aria-label", "Colours");
    for (const place of [-1, -0.5, 0, 0.5, 1]) {
      const share = Math.sign(place) * place * place;
      const item = make("li", "keel-tick", formatNumber(place ? scale.back(share * most) : scale.zero));
      colour(item, share);
      list.append(item);
    }
    return list;
  }

  // Return channel -> values, the shown channel first.
  function table(row, first) {
    const names = [first, ...channels(row).filter((name) => name !== first)];
    return new Map(names.map((name) => [name, values(row, name)]));
  }

  // The list is one stop of the Tab key. The arrow keys move between tokens.
  function addNavigation(list, readout, valuesByChannel) {
    const items = [...list.children];
    const show = (item) => {
      const at = items.indexOf(item);
      readout.replaceChildren(make("b", "keel-piece-name", item.textContent.trim() || "space"));
      for (const [name, numbers] of valuesByChannel) readout.append(make("span", "keel-figure", `${name} ${formatNumber(numbers[at])}`));
    };
    list.addEventListener("pointerover", (event) => event.target.closest(".keel-piece") && show(event.target));
    list.addEventListener("focusin", (event) => {
      for (const item of items) item.tabIndex = item === event.target ? 0 : -1;
      show(event.target);
    });
    list.addEventListener("keydown", (event) => {
      const at = items.indexOf(event.target);
      const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: items.length - 1 }[event.key];
      if (to === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      items[Math.min(Math.max(to, 0), items.length - 1)].focus();
    });
  }

  function tokens(row, channel, valuesByChannel, shares) {
    const list = make("div", "keel-pieces");
    list.setAttribute("role", "listbox");
    list.setAttribute("aria-label", `The response by tokens, coloured by ${channel}. The arrow keys move between tokens.`);
    list.dir = "auto";
    pieces(row).forEach((piece, at) => {
      const item = make("span", "keel-piece", visible(piece));
      item.setAttribute("role", "option");
      item.setAttribute("aria-label", `${piece.trim() || "space"}: ${channel} ${formatNumber(valuesByChannel.get(channel)[at])}`);
      item.tabIndex = at ? -1 : 0;
      colour(item, shares[at]);
      list.append(item);
    });
    return list;
  }

  function render(element, row, channel) {
    const scale = CHANNELS[channel][1];
    const valuesByChannel = table(row, channel);
    const scaled = valuesByChannel.get(channel).map(scale.scaled);
    const most = Math.max(0, ...scaled.filter(Number.isFinite).map(Math.abs));
    const list = tokens(row, channel, valuesByChannel, scaled.map((value) => (most && Number.isFinite(value) ? value / most : 0)));
    const readout = make("p", "keel-readout", "Point at a token, or move to it with the arrow keys, to read its values.");
    readout.setAttribute("aria-live", "polite");
    addNavigation(list, readout, valuesByChannel);
    const head = make("div", "keel-head");
    head.append(make("p", "keel-meaning", meanings[channel]), legend(most, scale));
    element.classList.add("keel-tokens");
    element.replaceChildren(head, list, readout);
  }

  return { channels, render, meanings };
})();
