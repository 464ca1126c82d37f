// The page after the last item, on which only undo is possible.

import { undo } from "./send.js";

const button = document.querySelector("[data-command=undo]");
button?.addEventListener("click", undo);
addEventListener("keydown", (event) => {
  if (button && event.key === "u" && !event.ctrlKey && !event.metaKey && !event.altKey) undo();
});
