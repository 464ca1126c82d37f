// Long texts are folded: the page stays short enough to be ranked, and one button shows the rest.

const TALL = 1.5; // times the height of a folded text; what is hardly taller is shown at once

export function fold(texts) {
  for (const text of texts) {
    text.classList.add("folded");
    if (text.scrollHeight <= TALL * text.clientHeight) text.classList.remove("folded");
    else text.after(button(text));
  }
}

function button(text) {
  const element = document.createElement("button");
  element.type = "button";
  element.className = "unfold quiet";
  const label = `Show all ${text.textContent.length.toLocaleString("en")} characters`;
  const draw = () => {
    const folded = text.classList.contains("folded");
    element.textContent = folded ? label : "Show less";
    element.setAttribute("aria-expanded", !folded);
  };
  element.addEventListener("click", () => {
    text.classList.toggle("folded");
    draw();
    if (text.classList.contains("folded")) text.scrollIntoView({ block: "nearest" });
  });
  draw();
  return element;
}
