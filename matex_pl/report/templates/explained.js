"use strict";
const entries = JSON.parse(document.getElementById("entries").textContent);
const get = (id) => document.getElementById(id);
const sentences = [...document.querySelectorAll(".sentence")];
let chosen = 0;

function shape(name, attributes, parent) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  parent.append(node);
}

function mark(entry) {
  const svg = get("marks"), size = svg.viewBox.baseVal;
  svg.replaceChildren();
  for (const box of entry.boxes) {
    const place = { x: box.x0, y: box.y0, width: box.x1 - box.x0, height: box.y1 - box.y0 };
    shape("rect", { ...place, class: "edge" }, svg);
    shape("rect", { ...place, class: "box" }, svg);
  }
  if (!entry.peak) return;
  const arm = 0.02 * Math.max(size.width, size.height), { x, y } = entry.peak;
  const path = `M${x - arm} ${y}H${x + arm}M${x} ${y - arm}V${y + arm}`;
  shape("path", { d: path, class: "edge wide" }, svg);
  shape("path", { d: path, class: "cross" }, svg);
}

function choose(index, focus) {
  chosen = (index + entries.length) % entries.length;
  const entry = entries[chosen];
  sentences.forEach((node, place) => node.setAttribute("aria-pressed", place === chosen));
  get("map").src = entry.map;
  get("map").alt = `Map of the sentence: ${sentences[chosen].textContent.trim()}`;
  get("place").textContent = `${chosen + 1} / ${entries.length}`;
  for (const article of document.querySelectorAll("article")) article.hidden = article.id !== `s${entry.number}`;
  mark(entry);
  if (focus) sentences[chosen].focus({ preventScroll: true });
  if (focus) sentences[chosen].scrollIntoView({ block: "nearest" });
}

function toggle(id) {
  get(id).checked = !get(id).checked;
  get(id).dispatchEvent(new Event("change"));
}

sentences.forEach((node, index) => {
  node.addEventListener("click", () => { if (!String(getSelection())) choose(index, false); });
  node.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(index, false); }
  });
});
get("back").addEventListener("click", () => choose(chosen - 1, false));
get("on").addEventListener("click", () => choose(chosen + 1, false));
get("show-map").addEventListener("change", (event) => { get("map").hidden = !event.target.checked; });
get("show-marks").addEventListener("change", (event) => { get("marks").style.display = event.target.checked ? "" : "none"; });
get("opacity").addEventListener("input", (event) => { get("map").style.opacity = event.target.value / 100; });
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input[type=range], .scroll")) return;
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  if (event.key in steps) { event.preventDefault(); choose(chosen + steps[event.key], true); }
  if (event.key === "Home") { event.preventDefault(); choose(0, true); }
  if (event.key === "End") { event.preventDefault(); choose(-1, true); }
  if (event.key === "m" || event.key === "M") toggle("show-map");
  if (event.key === "b" || event.key === "B") toggle("show-marks");
});
choose(0, false);
