// Images are templates, of which those of one page are in the document: as many as are looked at in one go. The script of
// the page before this one says what they are sorted by (`sorting`), which controls change that (`controls`), and what is
// to be done with those that are shown (`dress`).
const PAGE = 20;
const templates = [...document.querySelectorAll("template")];
let chosen = [], first = 0;

function by(id) {
  return document.getElementById(id);
}

function choose() {
  const wanted = by("name").value.toLowerCase(), { sorted, value } = sorting(), order = Number(by("order").value);
  by("order").disabled = !sorted;
  const valued = templates.filter(each => each.dataset.name.toLowerCase().includes(wanted)).map(template => {
    const found = sorted ? value(template) : 0;
    return { template, name: template.dataset.name, value: Number.isNaN(found) ? order * Infinity : found };
  });
  valued.sort((a, b) => (a.value === b.value ? 0 : order * (a.value - b.value)) || a.name.localeCompare(b.name));
  chosen = valued.map(each => each.template);
  first = 0;
  show();
}

function show() {
  const shown = chosen.slice(first, first + PAGE);
  by("gallery").replaceChildren(...shown.map(template => document.importNode(template.content, true)));
  dress(by("gallery"));
  by("back").disabled = first === 0;
  by("on").disabled = first + PAGE >= chosen.length;
  by("place").textContent = shown.length
    ? `images ${first + 1} to ${first + shown.length} of ${chosen.length}`
    : templates.length ? "no image has such a name" : "no image";
}

function turn(pages) {
  const button = document.activeElement;
  first += pages * PAGE;
  show();
  by("images").scrollIntoView();
  if (button.disabled) by(pages > 0 ? "back" : "on").focus({ preventScroll: true });
}

for (const id of controls) by(id).addEventListener("change", choose);
by("name").addEventListener("input", choose);
by("back").addEventListener("click", () => turn(-1));
by("on").addEventListener("click", () => turn(1));
document.querySelector("form").addEventListener("submit", event => event.preventDefault());
choose();
