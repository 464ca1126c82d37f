// Folding of long texts, with a button that shows the rest.

const TALL = 1.5; // times the folded height; a text that is less tall is not folded

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
