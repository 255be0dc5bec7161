"use strict";
// Lays out a run: what each window's fit came to and took, the curves of the last ones and of the polish.

const found = JSON.parse(document.getElementById("findings").textContent);
const BLUE = "var(--s1)", ORANGE = "var(--s2)", GREY = "var(--s0)", GREEN = "var(--s3)";
const seconds = (value) => (value >= 60 ? `${Math.floor(value / 60)}:${String(Math.round(value % 60)).padStart(2, "0")} min` : `${value.toFixed(value < 10 ? 1 : 0)} s`);
const last = (window) => window.blocks[1] + 1;
const learned = found.windows.filter((window) => window.held_out?.length);
const bySquares = learned.filter((window) => window.objective === "mse");
const byOthers = learned.filter((window) => window.objective !== "mse");
const before = (window) => window.held_out[0][1];
const after = (window) => (window.held_out.find(([step]) => step === window.kept) ?? window.held_out.at(-1))[1];
const curve = (name, color, held_out) => ({ name, color, points: held_out.map(([x, y]) => ({ x, y })) });
const blockName = (window) => (window.blocks[0] === window.blocks[1] ? `block ${last(window)}` : `blocks ${window.blocks[0] + 1} to ${last(window)}`);

const charts = [];
if (bySquares.length > 1)
  charts.push(chart({ title: "Error of each block, before and after", note: "Squared error of the block's output on held-out rows. The first blocks' are small because what enters them is.", series: [
    { name: "start", color: GREY, points: bySquares.map((window) => ({ x: last(window), y: before(window) })) },
    { name: "fitted", color: BLUE, points: bySquares.map((window) => ({ x: last(window), y: after(window) })) },
  ], xLabel: "block", yLabel: "squared error (log)", log: true, format: nats, xFormat: (x) => `block ${x}` }));
if (bySquares.length > 1)
  charts.push(chart({ title: "What the fit left of it", note: "The fitted block's error as a share of that at its start: where it is high the fit could do little.", series: [
    { name: "left", color: BLUE, points: bySquares.map((window) => ({ x: last(window), y: after(window) / before(window) })) },
  ], xLabel: "block", yLabel: "share of the error left", format: share, xFormat: (x) => `block ${x}` }));
if (byOthers.length)
  charts.push(chart({ title: "The final blocks", note: "Held-out measure of the objective while they were fitted; the least is kept.", series: byOthers.map((window, index) => curve(`${window.objective}, ${blockName(window)}`, [ORANGE, GREEN, BLUE][index % 3], window.held_out)), xLabel: "step", yLabel: "held-out measure", domain: spread(byOthers.flatMap((window) => window.held_out)), format: nats, xFormat: (x) => `step ${x}` }));
if (found.polish?.held_out?.length)
  charts.push(chart({ title: "The polish", note: "KL to full precision on held-out rows while all scales are tuned together; the least is kept.", series: [curve("polish", GREEN, found.polish.held_out)], xLabel: "step", yLabel: "KL (nats a token)", domain: spread(found.polish.held_out), format: nats, xFormat: (x) => `step ${x}` }));
const timed = found.windows.filter((window) => window.seconds > 0);
if (timed.length > 1)
  charts.push(chart({ title: "Time of each fit", note: "What lies between is reading weights and moving activations on.", series: [
    { name: "seconds", color: BLUE, points: timed.filter((window) => window.objective === "mse").map((window) => ({ x: last(window), y: window.seconds })) },
  ], xLabel: "block", yLabel: "seconds", format: (value) => seconds(value), xFormat: (x) => `block ${x}` }));

/** Ends of an axis that leave a curve room, 0 not among them. */
function spread(held_out) {
  const values = held_out.map(([, value]) => value), low = Math.min(...values), high = Math.max(...values);
  const room = (high - low || high || 1) * 0.15;
  return [Math.max(0, low - room), high + room];
}

if (charts.length) section("How it went", "On rows that nothing was learned from.", element("div", { class: "grid" }, ...charts));

if (learned.length)
  section("Every fit", "KL is to full precision at the model's end, in nats a token. Press a column's head to sort.", table([
    ["window", (row) => ({ sort: last(row), text: blockName(row) })],
    ["fitted by", (row) => ({ sort: row.objective, text: row.objective })],
    ["steps", (row) => plain(row.losses.length, count)],
    ["kept", (row) => plain(row.kept, count)],
    ["before", (row) => plain(before(row), nats)],
    ["after", (row) => plain(after(row), nats)],
    ["left", (row) => plain(after(row) / before(row), share)],
    ["held-out KL", (row) => plain(row.held_out_kl, (value) => value.toFixed(4))],
    ["time", (row) => plain(row.seconds, seconds)],
  ], learned));

const text = found.calibration;
footer({
  model: `${found.model.name}, ${found.model.dtype}`, sha256: found.model.sha256,
  size: `${size(found.size_bytes)}, ${found.bits_per_weight.toFixed(2)} bits a quantized weight, ${found.bits_per_parameter.toFixed(2)} a parameter`,
  grids: Object.entries(found.grids).map(([grid, layers]) => `${layers} layers: ${grid}`).join("; "),
  calibration: text.rows ? `${found.recipe.calibration}: ${count(text.rows)} rows, ${count(text.counted_tokens)} tokens that count; ${count(text.held_out_rows ?? 0)} rows held out` : "none is read",
  ...Object.fromEntries(Object.entries(found.choices).map(([key, choice]) => [key.replaceAll("_", " "), `${choice.value} (${choice.why})`])),
  recipe: Object.entries(found.recipe).filter(([, value]) => value !== null && typeof value !== "object").map(([key, value]) => `${key} ${value}`).join(", "),
  versions: Object.entries(found.versions).map(([key, value]) => `${key} ${value}`).join(", "),
});
