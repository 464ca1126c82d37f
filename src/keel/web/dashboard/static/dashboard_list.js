// A list of any length. Only the rows on the screen exist as elements, and data is fetched in pages on scrolling.

const PAGE = 200; // rows, as the server sends them
const MAX_PAGES = 40; // kept in memory
const SPARE = 8; // rows drawn above and below the visible ones
const AHEAD = 100; // rows fetched above and below the visible ones
const RETRY_DELAY = 500; // milliseconds after a failed request
const TALLEST = 15_000_000; // pixels, below the height beyond which browsers draw nothing

export class List {
  // `load(offset)` -> {rows, matched}; `fill(element, row)` draws a row; `open(row, number)` shows it.
  constructor(element, height, { load, fill, open }) {
    Object.assign(this, { element, height, load, fill, open });
    this.total = 0;
    this.pages = new Map(); // by number: rows
    this.drawn = new Map(); // by row: its element
    this.free = []; // unused elements
    this.active = -1;
    this.turn = 0; // number of the query; replies to earlier queries are dropped
    this.space = document.createElement("div");
    this.space.className = "space";
    this.space.style.setProperty("--row", `${height}px`);
    element.replaceChildren(this.space);
    element.addEventListener("scroll", () => this.onScroll(), { passive: true });
    element.addEventListener("click", (event) => this.onClick(event));
    element.addEventListener("keydown", (event) => this.onKey(event));
    new ResizeObserver(() => this.draw()).observe(element);
  }

  // Show the result of another query; `first` is its first page.
  show(first, keep = false) {
    this.turn += 1;
    this.total = first.matched;
    this.element.classList.toggle("empty", !this.total);
    this.pages = new Map([[0, first.rows]]);
    for (const [number, element] of this.drawn) this.release(number, element);
    this.space.style.height = `${this.tall}px`;
    if (!keep) {
      this.element.scrollTop = 0;
      this.active = -1;
    }
    this.draw();
  }

  // Extend the result of the same query by rows at its end.
  grow(first) {
    this.total = first.matched;
    this.element.classList.toggle("empty", !this.total);
    this.space.style.height = `${this.tall}px`;
    const last = [...this.pages.keys()].filter((page) => this.pages.get(page).length < PAGE);
    for (const page of last) this.pages.delete(page);
    this.pages.set(0, first.rows);
    this.draw();
  }

  get tall() {
    return Math.min(this.total * this.height, TALLEST);
  }

  // Number of the first visible row. If the list is too tall for the browser, scrolling is scaled.
  get firstSeen() {
    const room = this.element.clientHeight;
    const share = this.tall > room ? this.element.scrollTop / (this.tall - room) : 0;
    return share * Math.max(this.total - room / this.height, 0);
  }

  row(number) {
    return this.pages.get(Math.floor(number / PAGE))?.[number % PAGE];
  }

  // ---- drawing

  onScroll() {
    if (!this.frame) this.frame = requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.frame = 0;
    const seen = this.firstSeen;
    const first = Math.max(0, Math.floor(seen) - SPARE);
    const end = Math.min(this.total, Math.ceil(seen + this.element.clientHeight / this.height) + SPARE);
    for (const [number, element] of this.drawn) if (number < first || number >= end) this.release(number, element);
    const top = this.element.scrollTop - seen * this.height; // of row 0; 0 unless the list is too tall
    for (let number = first; number < end; number += 1) this.place(number, Math.round(top + number * this.height));
    this.element.setAttribute("aria-busy", !this.isThere(first, end));
    this.fetchNear(first, end);
  }

  // Elements are reused for other rows: creating them during scrolling would miss the frame.
  release(number, element) {
    this.drawn.delete(number);
    this.free.push(element);
    element.hidden = true;
    element.removeAttribute("id");
    delete element.dataset.number;
  }

  place(number, top) {
    const element = this.drawn.get(number) ?? this.take(number);
    if (element.top !== top) element.style.transform = `translateY(${top}px)`;
    element.top = top;
    const row = this.row(number);
    if (row !== element.row) {
      if (row) this.fill(element, row);
      element.classList.toggle("waiting", !row);
      element.row = row;
    }
  }

  take(number) {
    let element = this.free.pop();
    if (!element) {
      element = document.createElement("div");
      element.className = "item waiting";
      element.setAttribute("role", "option");
      this.space.append(element);
    }
    element.hidden = false;
    element.id = `${this.element.id}-${number}`;
    element.dataset.number = number;
    element.setAttribute("aria-posinset", number + 1);
    element.setAttribute("aria-setsize", this.total);
    element.setAttribute("aria-selected", number === this.active);
    this.drawn.set(number, element);
    return element;
  }

  // ---- data

  isThere(first, end) {
    for (let number = first; number < end; number += 1) if (!this.row(number)) return false;
    return true;
  }

  // Fetch one page after the other. Each request is for the rows that are visible, or nearly so, at that moment.
  async fetchNear(first, end) {
    this.wanted = [first - AHEAD, end + AHEAD];
    if (this.fetching) return;
    this.fetching = true;
    for (let page = this.missing(); page >= 0; page = this.missing()) {
      if (!(await this.fetch(page))) await new Promise((resolve) => setTimeout(resolve, RETRY_DELAY));
      if (!this.frame) this.draw();
    }
    this.fetching = false;
  }

  missing() {
    const last = Math.min(this.wanted[1], this.total) - 1;
    for (let page = Math.floor(Math.max(this.wanted[0], 0) / PAGE); page * PAGE <= last; page += 1) {
      if (!this.pages.has(page)) return page;
    }
    return -1;
  }

  // Return true if the page was fetched, or is no longer needed.
  async fetch(page) {
    const turn = this.turn;
    const result = await this.load(page * PAGE).catch(() => null);
    if (turn !== this.turn) return true;
    if (result) this.pages.set(page, result.rows);
    for (const old of this.pages.keys()) {
      if (this.pages.size <= MAX_PAGES) break;
      if (old && old !== page) this.pages.delete(old);
    }
    return Boolean(result);
  }

  // ---- choosing a row

  onClick(event) {
    const item = event.target.closest(".item");
    if (item) this.choose(Number(item.dataset.number), true);
  }

  onKey(event) {
    const seen = Math.max(1, Math.floor(this.element.clientHeight / this.height) - 1);
    const by = { ArrowDown: 1, ArrowUp: -1, PageDown: seen, PageUp: -seen }[event.key];
    const to = { Home: 0, End: this.total - 1 }[event.key];
    if (event.key === "Enter" && this.active >= 0) this.choose(this.active, true);
    else if (event.altKey || event.ctrlKey || event.metaKey || (by === undefined && to === undefined)) return;
    else this.choose(to ?? this.active + by, false);
    event.preventDefault();
  }

  // With `opens`, show the row even if none is shown yet.
  async choose(number, opens) {
    if (!this.total) return;
    this.drawn.get(this.active)?.setAttribute("aria-selected", false);
    this.active = Math.min(Math.max(number, 0), this.total - 1);
    this.bring(this.active);
    this.draw();
    this.drawn.get(this.active)?.setAttribute("aria-selected", true);
    this.element.setAttribute("aria-activedescendant", `${this.element.id}-${this.active}`);
    if (!this.row(this.active)) await this.fetch(Math.floor(this.active / PAGE));
    const row = this.row(this.active);
    if (row) this.open(row, opens);
  }

  bring(number) {
    const room = this.element.clientHeight / this.height;
    const seen = this.firstSeen;
    if (number >= seen && number + 1 <= seen + room) return;
    const wanted = number < seen ? number : number + 1 - room;
    const room_left = Math.max(this.total - room, 0);
    this.element.scrollTop = room_left ? (wanted / room_left) * (this.tall - this.element.clientHeight) : 0;
  }
}
