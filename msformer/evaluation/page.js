"use strict";
// Images are templates, of which those of one page are in the document: as many as are looked at in one go.
const PAGE = 20;
const by = id => document.getElementById(id);
const templates = [...document.querySelectorAll("template")];
let chosen = [], first = 0;

function score(template, method, protocol, missing) {
  const found = template.content.querySelector(`.result[data-method="${method}"]`);
  const value = found ? Number(found.getAttribute("data-" + protocol)) : NaN;
  return Number.isNaN(value) ? missing : value;
}

function choose() {
  const protocol = by("protocol").value, method = by("method").value, order = Number(by("order").value);
  const wanted = by("name").value.toLowerCase();
  by("order").disabled = !method;
  const scored = templates.filter(each => each.dataset.name.toLowerCase().includes(wanted)).map(template => ({
    template, name: template.dataset.name, score: method ? score(template, method, protocol, order * Infinity) : 0,
  }));
  scored.sort((a, b) => (a.score === b.score ? 0 : order * (a.score - b.score)) || a.name.localeCompare(b.name));
  chosen = scored.map(each => each.template);
  first = 0;
  show();
}

function show() {
  const protocol = by("protocol").value, method = by("method").value, shown = chosen.slice(first, first + PAGE);
  by("gallery").classList.toggle("blind", by("show").value === "blind");
  by("gallery").replaceChildren(...shown.map(template => document.importNode(template.content, true)));
  for (const figure of by("gallery").querySelectorAll(".result")) {
    figure.querySelector("b").textContent = figure.getAttribute("data-" + protocol);
    figure.classList.toggle("chosen", figure.dataset.method === method);
  }
  by("back").disabled = first === 0;
  by("on").disabled = first + PAGE >= chosen.length;
  by("place").textContent = shown.length
    ? `images ${first + 1} to ${first + shown.length} of ${chosen.length}` : "no image has such a name";
}

function turn(pages) {
  const button = document.activeElement;
  first += pages * PAGE;
  show();
  by("images").scrollIntoView();
  if (button.disabled) by(pages > 0 ? "back" : "on").focus({ preventScroll: true });
}

for (const id of ["protocol", "method", "order"]) by(id).addEventListener("change", choose);
by("name").addEventListener("input", choose);
by("show").addEventListener("change", show);
by("back").addEventListener("click", () => turn(-1));
by("on").addEventListener("click", () => turn(1));
document.querySelector("form").addEventListener("submit", event => event.preventDefault());
choose();
