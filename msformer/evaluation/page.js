const controls = ["protocol", "method", "order"];

function sorting() {
  const protocol = by("protocol").value, method = by("method").value;
  return {
    sorted: method,
    value: template => {
      const found = template.content.querySelector(`.result[data-method="${method}"]`);
      return found ? Number(found.getAttribute("data-" + protocol)) : NaN;
    },
  };
}

function dress(gallery) {
  const protocol = by("protocol").value, method = by("method").value;
  gallery.classList.toggle("blind", by("show").value === "blind");
  for (const figure of gallery.querySelectorAll(".result")) {
    figure.querySelector("b").textContent = figure.getAttribute("data-" + protocol);
    figure.classList.toggle("chosen", figure.dataset.method === method);
  }
}

document.getElementById("show").addEventListener("change", () => show());
