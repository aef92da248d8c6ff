"use strict";
// Sorting by any column, with mouse or keyboard, and the drill-down of a cell. Text is set as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);

function value(cell) {
  if (cell === undefined) return null;
  if (cell.dataset.v !== undefined) return cell.dataset.v === "" ? null : Number(cell.dataset.v);
  return cell.textContent.trim().toLowerCase();
}

function sort(button) {
  const head = button.closest("th"), table = button.closest("table"), at = Number(head.dataset.column);
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of table.querySelectorAll("th[aria-sort]")) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const body = table.tBodies[0], rows = [...body.rows];
  const at_cell = (row) => [...row.cells].find((cell) => Number(cell.dataset.c) === at);
  rows.sort((a, b) => {
    const x = value(at_cell(a)), y = value(at_cell(b));
    if (x === null || y === null) return (x === null) - (y === null);  // what has no value stays below
    const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
    return down ? -order : order;
  });
  body.append(...rows);
}

function make(tag, text, name) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (name) node.className = name;
  return node;
}

function pictures(run) {
  const box = make("div", undefined, "pictures");
  for (const [title, address] of run.pictures.map((id) => data.images[id])) {
    const figure = make("figure"), image = make("img");
    image.src = address; image.alt = title;
    figure.append(image, make("figcaption", title));
    box.append(figure);
  }
  return box;
}

function curve([title, flat]) {
  const points = flat.filter((_, i) => i % 2 === 0).map((step, i) => [step, flat[2 * i + 1]]);
  const wide = 360, high = 130, left = 44, svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const add = (tag, attributes, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, given] of Object.entries(attributes)) node.setAttribute(name, given);
    if (text !== undefined) node.textContent = text;
    svg.append(node);
  };
  const xs = points.map((p) => p[0]), ys = points.map((p) => p[1]);
  const x0 = Math.min(...xs), x1 = Math.max(...xs, x0 + 1), y0 = Math.min(...ys), y1 = Math.max(...ys, y0 + 1e-9);
  const place = (p) => [left + (wide - left - 8) * (p[0] - x0) / (x1 - x0), 8 + (high - 30) * (1 - (p[1] - y0) / (y1 - y0))];
  svg.setAttribute("viewBox", `0 0 ${wide} ${high}`); svg.setAttribute("width", wide); svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", title);
  add("polyline", { points: points.map((p) => place(p).map((v) => v.toFixed(1)).join(",")).join(" "), fill: "none", stroke: "#0072b2", "stroke-width": 1.5 });
  const style = { fill: "currentColor", "font-size": 10 };
  add("text", { ...style, x: 0, y: 14 }, y1.toPrecision(3)); add("text", { ...style, x: 0, y: high - 20 }, y0.toPrecision(3));
  add("text", { ...style, x: left, y: high - 6 }, `${title}, steps ${x0} to ${x1}`);
  return svg;
}

function bars(counts, own) {
  const box = make("div", undefined, "bars"), most = Math.max(...counts.map((c) => c[1]), 1);
  for (const [label, count] of counts) {
    const bar = make("i", undefined, label === own ? "own" : "");
    bar.style.width = `${100 * count / most}%`;
    box.append(make("span", `class ${label}`), bar, make("span", String(count)));
  }
  return box;
}

function part(into, title, ...nodes) { into.append(make("h3", title), ...nodes); }

function show([ids, more]) {
  const dialog = document.getElementById("cell"), into = document.getElementById("inside");
  into.replaceChildren();
  for (const id of ids) {
    const run = data.runs[id], row = run.row;
    into.append(make("h2", `${row.attack} / ${row.defense}, victim seed ${row.victim_seed}` + (row.defense_seed === null ? "" : `, defense seed ${row.defense_seed}`)));
    if (row.state !== "ok") into.append(make("p", `${row.state}: ${row.reason}`, "fail"));
    const table = make("table"), body = table.createTBody();
    for (let i = 0; i < run.told.length; i += 2) {
      const [name, text] = run.told.slice(i, i + 2).map((id) => data.words[id]);
      body.insertRow().append(make("th", name, "text"), make("td", text, "wrap"));
    }
    into.append(table);
    if (run.pictures.length) part(into, "Triggers", pictures(run));
    for (const recorded of run.curves.map((id) => data.curves[id])) part(into, recorded[0], curve(recorded));
    const confusion = run.confusion === null ? null : data.confusions[run.confusion];
    if (confusion) part(into, `Clean images of the target class ${row.target}: what the model calls them`, bars(confusion.target, row.target));
    if (confusion) part(into, "Triggered images: what the model calls them", bars(confusion.fired, row.target));
    const params = Object.entries(run.params).map(([name, id]) => [name, data.params[id]]);
    part(into, "Parameters", make("pre", JSON.stringify(Object.fromEntries(params), null, 1)));
    part(into, "Provenance", make("pre", JSON.stringify(data.provenance[run.provenance], null, 1)));
    if (run.log !== null) part(into, "Log of the failure", make("pre", data.logs[run.log]));
  }
  if (more) into.append(make("p", `Not shown, to keep the page small: ${more} of the ${ids.length + more} runs of this cell.`));
  dialog.showModal();
  dialog.scrollTop = 0;
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.cell) show(data.cells[button.dataset.cell]);
  else if (button.dataset.sort !== undefined) sort(button);
  else if (button.classList.contains("close")) document.getElementById("cell").close();
});
