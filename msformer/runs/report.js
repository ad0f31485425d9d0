const controls = ["sort", "order"];

function sorting() {
  const key = by("sort").value;
  return { sorted: key, value: template => Number(template.dataset[key] ?? NaN) };
}

function dress() {}
