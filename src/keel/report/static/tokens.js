// The token view: the pieces of an answer, coloured by what the run kept of each token. Plain text nodes, no library.
// keelTokens.channels(row) -> names; keelTokens.render(element, row, channel) draws; both read a row of rollouts.jsonl.

const keelTokens = (() => {
  "use strict";

  const plain = { zero: 0, scaled: (value) => value, back: (scaled) => scaled };
  const ratio = { zero: 1, scaled: Math.log, back: Math.exp }; // half as likely is as far from 1 as twice as likely

  const difference = (one, other) => one && other && one.map((value, at) => numeric(value) - numeric(other[at]));

  // Each channel: the numbers of a row, their scale, and what they mean.
  const CHANNELS = {
    reward: [(row) => row.rewards, plain, "What each token was paid: its KL penalty, and the score where it is paid."],
    kl: [(row) => difference(row.logprobs, row.ref_logprobs), plain, "Log-probability above the reference's: above 0 the policy wants the token more than the reference does."],
    value: [(row) => row.values, plain, "What the critic expected to be paid from this token on."],
    advantage: [(row) => row.advantages, plain, "Whether the token turned out better or worse than expected; the update makes tokens above 0 likelier."],
    ratio: [(row) => row.ratio, ratio, "How much likelier the token was after the update; 1 is unchanged."],
    logprob: [(row) => row.logprobs, plain, "Log-probability of the token when it was sampled; far below 0 is a surprise."],
  };
  const meanings = Object.fromEntries(Object.entries(CHANNELS).map(([name, [, , meaning]]) => [name, meaning]));

  const numeric = (value) => (typeof value === "number" && Number.isFinite(value) ? value : NaN);

  function values(row, channel) {
    const found = CHANNELS[channel][0](row);
    return Array.isArray(found) ? found.map(numeric) : [];
  }

  const channels = (row) => Object.keys(CHANNELS).filter((channel) => values(row, channel).some(Number.isFinite));

  // Runs made before the texts of tokens were kept have their numbers only.
  const pieces = (row) => row.pieces ?? (row.tokens ?? []).map((token) => `[${token}]`);

  const visible = (piece) => piece.replace(/\r?\n/g, "↵\n").replace(/\t/g, "⇥\t") || "◌";

  function written(value) {
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

  // Share of full colour: the root shows small values beside a large one. The legend is drawn by the same rule.
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
      const item = make("li", "keel-tick", written(place ? scale.back(share * most) : scale.zero));
      colour(item, share);
      list.append(item);
    }
    return list;
  }

  // name -> numbers, the shown channel first.
  function table(row, first) {
    const names = [first, ...channels(row).filter((name) => name !== first)];
    return new Map(names.map((name) => [name, values(row, name)]));
  }

  // One stop of the Tab key; the arrows go from piece to piece.
  function steer(list, readout, figures) {
    const items = [...list.children];
    const show = (item) => {
      const at = items.indexOf(item);
      readout.replaceChildren(make("b", "keel-piece-name", item.textContent.trim() || "space"));
      for (const [name, numbers] of figures) readout.append(make("span", "keel-figure", `${name} ${written(numbers[at])}`));
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

  function tokens(row, channel, figures, shares) {
    const list = make("div", "keel-pieces");
    list.setAttribute("role", "listbox");
    list.setAttribute("aria-label", `The answer, token by token, coloured by ${channel}. The arrow keys go from token to token.`);
    list.dir = "auto";
    pieces(row).forEach((piece, at) => {
      const item = make("span", "keel-piece", visible(piece));
      item.setAttribute("role", "option");
      item.setAttribute("aria-label", `${piece.trim() || "space"}: ${channel} ${written(figures.get(channel)[at])}`);
      item.tabIndex = at ? -1 : 0;
      colour(item, shares[at]);
      list.append(item);
    });
    return list;
  }

  function render(element, row, channel) {
    const scale = CHANNELS[channel][1];
    const figures = table(row, channel);
    const scaled = figures.get(channel).map(scale.scaled);
    const most = Math.max(0, ...scaled.filter(Number.isFinite).map(Math.abs));
    const list = tokens(row, channel, figures, scaled.map((value) => (most && Number.isFinite(value) ? value / most : 0)));
    const readout = make("p", "keel-readout", "Point at a token, or go there with the arrow keys, to read its figures.");
    readout.setAttribute("aria-live", "polite");
    steer(list, readout, figures);
    const head = make("div", "keel-head");
    head.append(make("p", "keel-meaning", meanings[channel]), legend(most, scale));
    element.classList.add("keel-tokens");
    element.replaceChildren(head, list, readout);
  }

  return { channels, render, meanings };
})();
