"use strict";
// Values under the pointer, and pictures enlarged. All else works without.

document.documentElement.classList.add("js");
const tip = document.getElementById("tip");
const SVG = "http://www.w3.org/2000/svg";

function make(name, attributes, parent, text) {
  const svg = ["line", "circle", "g"].includes(name);
  const element = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

function written(value, unit) {
  const scaled = unit === "%" ? 100 * value : value;
  const text = Math.abs(scaled) >= 1000 ? Math.round(scaled).toLocaleString("en") : String(Number(scaled.toPrecision(3)));
  return unit ? `${text} ${unit}` : text;
}

for (const chart of document.querySelectorAll(".chart")) {
  const data = JSON.parse(chart.parentElement.querySelector("script").textContent);
  const [x0, x1, left, right] = chart.dataset.x.split(",").map(Number);
  const [y0, y1, bottom, top, log] = chart.dataset.y.split(",").map(Number);
  const marks = chart.querySelector(".at");
  const grow = log ? Math.log : (v) => v;
  const toX = (step) => left + ((step - x0) / (x1 - x0)) * (right - left);
  const toY = (v) => bottom + ((grow(v) - grow(y0)) / (grow(y1) - grow(y0))) * (top - bottom);
  const steps = [...new Set(data.groups.flatMap(([, , points]) => points.map((p) => p[0])))].sort((a, b) => a - b);
  let at = -1;

  function show(index) {
    at = Math.max(0, Math.min(steps.length - 1, index));
    const step = steps[at], box = chart.getBoundingClientRect(), scale = box.width / chart.viewBox.baseVal.width;
    marks.replaceChildren();
    tip.replaceChildren();
    make("line", { x1: toX(step), x2: toX(step), y1: top, y2: bottom }, marks);
    make("p", {}, tip, `step ${step.toLocaleString("en")}`);
    const rows = [];
    for (const [name, group, points] of data.groups) {
      const curve = chart.querySelector(`.g${group}`);
      if (!curve || getComputedStyle(curve).display === "none") continue;
      const near = points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
      if (Math.abs(near[0] - step) <= (x1 - x0) / 40) rows.push([near, name, curve.getAttribute("class").split(" ")[0]]);
    }
    for (const [[, mean, low, high], name, colour] of rows.sort((a, b) => b[0][1] - a[0][1])) {
      const row = make("div", { class: colour }, tip), label = make("span", {}, row);
      make("i", { class: "chip" }, label);
      label.append(name);
      const band = low === undefined ? "" : ` ± ${written((high - low) / 2, "%" === data.unit ? "%" : "")}`;
      make("b", {}, row, written(mean, data.unit === "%" ? "%" : "") + band);
      const y = toY(mean);
      if (y <= bottom + 1 && y >= top - 1) make("circle", { class: colour, r: 4, cx: toX(step), cy: y }, marks);
    }
    tip.hidden = false;
    const x = box.left + toX(step) * scale, wide = tip.offsetWidth;
    const side = x + 16 + wide < document.documentElement.clientWidth ? x + 16 : Math.max(8, x - 16 - wide);
    tip.style.left = `${side + scrollX}px`;
    tip.style.top = `${box.top + scrollY + 8}px`;
  }

  function hide() {
    marks.replaceChildren();
    tip.hidden = true;
    at = -1;
  }

  function follow(event) {
    const box = chart.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * chart.viewBox.baseVal.width;
    const step = x0 + ((x - left) / (right - left)) * (x1 - x0);
    show(steps.reduce((best, s, i) => (Math.abs(s - step) < Math.abs(steps[best] - step) ? i : best), 0));
  }

  chart.addEventListener("pointermove", follow);
  chart.addEventListener("pointerdown", follow);
  chart.addEventListener("pointerleave", hide);
  chart.addEventListener("blur", hide);
  chart.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) { event.preventDefault(); show(at < 0 ? (by > 0 ? 0 : steps.length - 1) : at + by); }
    else if (event.key === "Escape") hide();
  });
}

const large = document.getElementById("large");
const pictures = [...document.querySelectorAll(".picture")];
let open = 0;

function enlarge(index) {
  open = (index + pictures.length) % pictures.length;
  const figure = large.querySelector("figure");
  figure.replaceChildren(pictures[open].querySelector("img").cloneNode(), pictures[open].querySelector("figcaption").cloneNode(true));
  if (!large.open) large.showModal();
}

pictures.forEach((picture, index) => picture.querySelector("a").addEventListener("click", (event) => {
  event.preventDefault();
  enlarge(index);
}));
large.addEventListener("click", (event) => { if (event.target === large || event.target.tagName === "FIGURE") large.close(); });
large.addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (by) { event.preventDefault(); enlarge(open + by); }
});
