// Sending to the server so that nothing is lost and nothing is sent twice at a time.

const TRANSIENT = [429, 502, 503, 504];
const LONGEST_PAUSE = 16; // seconds
const TIMEOUT = 20_000; // milliseconds

const token = document.querySelector("main").dataset.csrf;
const alertRegion = document.getElementById("alert");
let busy = false;

const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, seconds * 1000));

async function attempt(path, body) {
  const response = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Keel-Token": token },
    body: JSON.stringify(body),
    signal: AbortSignal.timeout(TIMEOUT),
  });
  const answer = await response.json().catch(() => ({}));
  if (response.ok) return answer;
  const failure = new Error(answer.error ?? `The server answered ${response.status}.`);
  throw Object.assign(failure, { transient: TRANSIENT.includes(response.status) });
}

// fetch throws TypeError without a connection, and a DOMException at the time limit.
const isTransient = (failure) => failure.transient ?? true;

const reason = (failure) => ("transient" in failure ? failure.message : "The server does not answer.");

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

// Sends one thing at a time, and goes to the page that the server names. `again`: the same content may be sent twice.
export async function send(path, body, { again, sent = () => {} }) {
  if (busy) return;
  const focused = document.activeElement;
  setBusy(true);
  try {
    const answer = await (again ? persist : attempt)(path, body);
    sent();
    location.replace(answer.next); // stays busy: this page is done
  } catch (failure) {
    alertRegion.textContent = again ? reason(failure) : `${reason(failure)} Reload the page to see where you are.`;
    setBusy(false);
    focused.focus({ preventScroll: true });
  }
}

// Nothing can be changed while it is on its way, so what was sent is what was seen.
function setBusy(value) {
  busy = value;
  for (const part of document.querySelectorAll("[data-work]")) part.inert = value;
}

export const isBusy = () => busy;
export const undo = () => send("/undo", {}, { again: false });

addEventListener("pageshow", (event) => event.persisted && location.reload());
