// Requests that change something: repeated until they succeed, and one at a time.

const TRANSIENT = [429, 502, 503, 504];
const LONGEST_PAUSE = 16; // seconds
const TIMEOUT = 20_000; // milliseconds

const token = document.querySelector("main").dataset.csrf;
const alertRegion = document.getElementById("alert");
let busy = false;

const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, seconds * 1000));

async function attempt(path, content) {
  const response = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Keel-Token": token },
    body: JSON.stringify(content),
    signal: AbortSignal.timeout(TIMEOUT),
  });
  const body = await response.json().catch(() => ({}));
  if (response.ok) return body;
  const failure = new Error(body.error ?? `The server replied with status ${response.status}.`);
  throw Object.assign(failure, { transient: TRANSIENT.includes(response.status) });
}

// Without a status: fetch throws a TypeError without a connection, and a DOMException at the time limit.
const isTransient = (failure) => failure.transient ?? true;

const reason = (failure) => ("transient" in failure ? failure.message : "The server does not respond.");

async function persist(path, body) {
  for (let seconds = 1; ; seconds = Math.min(2 * seconds, LONGEST_PAUSE)) {
    try {
      return await attempt(path, body);
    } catch (failure) {
      if (!isTransient(failure)) throw failure;
      alertRegion.textContent = `${reason(failure)} Your work is kept; trying again in ${seconds} s.`;
      await pause(seconds);
    }
  }
}

// Send a request, then go to the page that the server names. With `again`, repeat it after a transient failure, which
// needs a request that the server may receive twice.
export async function send(path, body, { again, sent = () => {} }) {
  if (busy) return;
  const focused = document.activeElement;
  setBusy(true);
  try {
    const reply = await (again ? persist : attempt)(path, body);
    sent();
    location.replace(reply.next); // still busy, because this page is finished
  } catch (failure) {
    alertRegion.textContent = again ? reason(failure) : `${reason(failure)} Reload the page to see where you are.`;
    setBusy(false);
    focused.focus({ preventScroll: true });
  }
}

// Nothing can be changed during a request, so that what the server records is what the page shows.
function setBusy(value) {
  busy = value;
  for (const part of document.querySelectorAll("[data-work]")) part.inert = value;
}

export const isBusy = () => busy;
export const undo = () => send("/undo", {}, { again: false });

// A page that the browser restores from its history may show an item that was submitted since.
addEventListener("pageshow", (event) => event.persisted && location.reload());
