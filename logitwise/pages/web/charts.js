"use strict";
// Line charts in SVG: axes with units, names at the ends of lines, values under the pointer or by arrow keys.

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 300;

/** An element with attributes and children; texts become text, never markup. */
function element(name, attributes = {}, ...children) {
  const made = ["svg", "g", "path", "line", "text", "circle", "rect"].includes(name)
    ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "color") made.style.setProperty("--own", value);
    else if (value !== undefined && value !== null) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Round values between two ends, about `count` of them. */
function niceTicks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw);
  const ticks = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-6; value += step) ticks.push(Number(value.toPrecision(10)));
  return ticks;
}

/** The next of 1, 2, 5, 10, 20 ... on the side that `round` takes. */
function roundEnd(value, round) {
  const power = 10 ** Math.floor(Math.log10(value));
  return Number((round([1, 2, 5, 10].map((factor) => factor * power), value)).toPrecision(1));
}

/** Powers of ten, or more where there are few, and both ends where they stand apart from those. */
function logTicks(low, high) {
  const ticks = [], decades = Math.log10(high / low);
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += decades > 5 ? 2 : 1)
    for (const factor of decades < 2 ? [1, 2, 5] : [1]) {
      const value = factor * 10 ** power;
      if (value >= low * 0.999 && value <= high * 1.001) ticks.push(value);
    }
  for (const end of [low, high])
    if (!ticks.some((tick) => Math.abs(Math.log10(end / tick)) < 0.08 * decades)) ticks.push(end);
  return ticks;
}

/** Moves labels apart that would lie upon one another. */
function spreadLabels(labels, least, low, high) {
  labels.sort((one, other) => one.y - other.y);
  labels.forEach((label, index) => { if (index) label.y = Math.max(label.y, labels[index - 1].y + least); });
  const over = labels.length ? labels[labels.length - 1].y - high : 0;
  if (over > 0) labels.forEach((label, index) => { label.y = Math.max(low + index * least, label.y - over); });
}

/**
 * A chart in a figure.
 * series: [{name, color, points: [{x, y, low, high}], dashed, step, quiet}]; x are numbers, or places in `categories`.
 */
function chart({ title, note, series, xLabel, yLabel, log = false, categories = null, format, xFormat, domain = null }) {
  const plot = element("div", { class: "plot" });
  const made = element("figure", {}, element("figcaption", {}, element("h3", {}, title), element("p", { class: "note" }, note)), plot);
  const shown = series.filter((one) => one.points.length);
  const xs = [...new Set(shown.flatMap((one) => (one.quiet ? [] : one.points.map((point) => point.x))))].sort((a, b) => a - b);
  let width = 0;
  let chosen = -1;

  function draw() {
    width = Math.max(240, plot.clientWidth);
    const direct = width >= 430;
    const longest = Math.max(...shown.map((one) => Math.min(one.name.length, 20)));
    const area = { left: 70, right: width - (direct ? 14 + 7 * longest : 12), top: 10, bottom: HEIGHT - 44 };
    const y = yScale(shown, log, domain, area), x = xScale(xs, categories, area);
    const svg = element("svg", { height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, tabindex: 0, role: "img", "aria-label": `${title}. ${yLabel} by ${xLabel}. Left and right arrow keys read the values.` });
    axes(svg, area, x, y, { xLabel, yLabel, categories, format, xFormat });
    const ends = shown.map((one) => line(svg, one, x, y));
    const legend = element("div", { class: "legend" }, ...(direct ? [] : shown.map((one) => element("span", { color: one.color }, one.name))));
    if (direct) {
      const labels = shown.map((one, index) => ({ name: one.name, color: one.color, y: ends[index] + 4 }));
      spreadLabels(labels, 15, area.top + 8, area.bottom + 4);
      for (const label of labels) {
        const name = label.name.length > 20 ? `${label.name.slice(0, 19)}…` : label.name;
        const text = element("text", { class: "name", x: area.right + 8, y: label.y }, name);
        text.style.fill = label.color;
        svg.append(text);
      }
    }
    const guide = element("line", { class: "guide", y1: area.top, y2: area.bottom, visibility: "hidden" });
    const dots = element("g");
    const tip = element("div", { class: "tip", role: "status", hidden: "" });
    svg.append(guide, dots);
    plot.replaceChildren(legend, svg, tip);
    const read = (index) => point(index, { svg, guide, dots, tip, x, y });
    svg.addEventListener("pointermove", (event) => {
      const at = event.clientX - svg.getBoundingClientRect().left;
      read(xs.reduce((best, value, index) => (Math.abs(x(value) - at) < Math.abs(x(xs[best]) - at) ? index : best), 0));
    });
    svg.addEventListener("pointerleave", () => read(-1));
    svg.addEventListener("blur", () => read(-1));
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step) { event.preventDefault(); read(Math.min(xs.length - 1, Math.max(0, chosen + step))); }
      if (event.key === "Escape") read(-1);
    });
  }

  function point(index, { guide, dots, tip, x, y }) {
    chosen = index;
    dots.replaceChildren();
    tip.hidden = index < 0;
    guide.setAttribute("visibility", index < 0 ? "hidden" : "visible");
    if (index < 0) return;
    const value = xs[index];
    guide.setAttribute("x1", x(value));
    guide.setAttribute("x2", x(value));
    const lines = [];
    for (const one of shown) {
      const found = one.points.find((candidate) => candidate.x === value);
      if (!found || one.quiet) continue;
      const error = found.high !== undefined ? ` ± ${format((found.high - found.low) / 2)}` : "";
      lines.push(element("span", { color: one.color }, `${one.name}: ${format(found.y)}${error}`));
      const dot = element("circle", { cx: x(value), cy: y(found.y), r: 4 });
      dot.style.fill = one.color;
      dots.append(dot);
    }
    tip.replaceChildren(element("b", {}, categories ? categories[value] : xFormat(value, shown[0].points.find((p) => p.x === value))), ...lines);
    const room = plot.clientWidth - tip.offsetWidth - 4;
    tip.style.left = `${Math.max(0, Math.min(room, x(value) + (x(value) + tip.offsetWidth + 16 > plot.clientWidth ? -tip.offsetWidth - 12 : 12)))}px`;
    tip.style.top = "14px";
  }

  new ResizeObserver(() => { if (plot.clientWidth && Math.abs(plot.clientWidth - width) > 1) draw(); }).observe(plot);
  return made;
}

function yScale(shown, log, domain, area) {
  const values = shown.flatMap((one) => one.points.flatMap((point) => [point.y, point.high ?? point.y])).filter((value) => Number.isFinite(value));
  let [low, high] = domain ?? [0, Math.max(...values) * 1.06 || 1];
  if (log) {
    const positive = shown.flatMap((one) => one.points.map((point) => point.y)).filter((value) => value > 0);
    low = roundEnd(Math.max(Math.min(...positive) * 0.9, Math.max(...values) * 1e-7), (ends, value) => ends.findLast((end) => end <= value));
    high = roundEnd(Math.max(...values) * 1.1, (ends, value) => ends.find((end) => end >= value));
  }
  const place = (share) => area.bottom - share * (area.bottom - area.top);
  const scale = log
    ? (value) => place(Math.log(Math.max(value, low) / low) / Math.log(high / low))
    : (value) => place((Math.min(Math.max(value, low), high) - low) / (high - low));
  scale.ticks = log ? logTicks(low, high) : niceTicks(low, high, 5);
  return scale;
}

function xScale(xs, categories, area) {
  const [low, high] = categories ? [-0.35, categories.length - 0.65] : [Math.min(...xs, 0), Math.max(...xs)];
  const scale = (value) => area.left + ((value - low) / (high - low || 1)) * (area.right - area.left);
  scale.ticks = categories ? categories.map((_, index) => index) : niceTicks(low, high, area.right - area.left > 300 ? 6 : 4);
  return scale;
}

function axes(svg, area, x, y, { xLabel, yLabel, categories, format, xFormat }) {
  for (const tick of y.ticks) {
    svg.append(
      element("line", { class: "grid-line", x1: area.left, x2: area.right, y1: y(tick), y2: y(tick) }),
      element("text", { x: area.left - 8, y: y(tick) + 4, "text-anchor": "end" }, format(tick, true)));
  }
  for (const tick of x.ticks)
    svg.append(element("text", { x: x(tick), y: area.bottom + 18, "text-anchor": "middle" }, categories ? categories[tick] : String(tick)));
  svg.append(
    element("line", { class: "axis", x1: area.left, x2: area.right, y1: area.bottom, y2: area.bottom }),
    element("text", { x: (area.left + area.right) / 2, y: area.bottom + 38, "text-anchor": "middle" }, xLabel),
    element("text", { transform: `translate(14 ${(area.top + area.bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, yLabel));
}

/** Draws one series; returns the height at which it ends. */
function line(svg, one, x, y) {
  const at = (point, value) => `${x(point.x).toFixed(1)} ${y(value).toFixed(1)}`;
  const banded = one.points.filter((point) => point.high !== undefined);
  if (banded.length > 1) {
    const around = [...banded.map((point) => at(point, point.high)), ...banded.slice().reverse().map((point) => at(point, point.low))];
    const band = element("path", { d: `M${around.join("L")}Z`, opacity: 0.14 });
    band.style.fill = one.color;
    svg.append(band);
  }
  const path = one.points.map((point, index) =>
    index && one.step ? `H${x(point.x).toFixed(1)}V${y(point.y).toFixed(1)}` : `${index ? "L" : "M"}${at(point, point.y)}`).join("");
  const stroke = element("path", { d: path, fill: "none", "stroke-width": one.quiet ? 1.25 : 2.25, "stroke-linejoin": "round", "stroke-dasharray": one.dashed ? "5 4" : undefined });
  stroke.style.stroke = one.color;
  svg.append(stroke);
  if (!one.step && !one.quiet && one.points.length < 30)
    for (const point of one.points) {
      const dot = element("circle", { cx: x(point.x), cy: y(point.y), r: 2.6 });
      dot.style.fill = one.color;
      svg.append(dot);
    }
  return y(one.points[one.points.length - 1].y);
}
