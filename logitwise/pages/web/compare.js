"use strict";
// Lays out a comparison: tables that sort, charts, flipped tokens and answers side by side.

const found = JSON.parse(document.getElementById("findings").textContent);
const original = found.models[0];
const others = found.models.slice(1);
found.models.forEach((model, index) => { model.color = index ? `var(--s${((index - 1) % 6) + 1})` : "var(--s0)"; });
const noise = { name: "bfloat16 noise", color: "var(--noise)", tokens: found.noise };

const name = (row) => ({ sort: row.name, text: row.name });
const tokens = (pick) => (row) => (row.tokens ? pick(row.tokens) : null);
// Of a served model KL is a lower bound, or nothing is known of its probabilities at all.
const measured = others.filter((model) => model.tokens);
const served = found.models.filter((model) => model.served);
const bounded = measured.filter((model) => model.tokens.coarse);
const least = (pick) => tokens((t) => { const cell = pick(t); return cell && t.coarse ? { ...cell, text: `≥ ${cell.text}` } : cell; });
const bounds = bounded.length ? ` ≥: a lower bound, since a server names only its likeliest tokens (${bounded.map((model) => `${model.name}: ${model.tokens.coarse.likeliest}`).join(", ")}) and the others count as one; so are all KL of it further down. All else is exact.` : "";
const silent = served.filter((model) => !model.tokens).map((model) => model.name).join(", ");

const AFTER = 32;

section("The models", `How far each is from full precision, token by token, on full precision's own answers. KL in nats; ± one standard error over answers. The last line is full precision computed in bfloat16. Press a column's head to sort.${bounds}${silent ? ` –: not known of ${silent}, whose server gives no log-probabilities of a prompt.` : ""}`,
  table([
    ["model", name],
    ["size", (row) => plain(row.size?.size_bytes, size)],
    ["bits a weight", (row) => plain(row.size?.bits_per_weight, (value) => value.toFixed(2))],
    ["KL", least((t) => figure(t.kl.mean, nats, brief))],
    ["KL, median", least((t) => plain(t.kl.median, brief))],
    ["KL, 90 %", least((t) => plain(t.kl.p90, brief))],
    ["KL, 99 %", least((t) => plain(t.kl.p99, brief))],
    ["reverse KL", least((t) => figure(t.reverse_kl.mean, nats, brief))],
    ["same likeliest token", tokens((t) => figure(t.top1, share, width))],
    ["decisions overturned", tokens((t) => figure(t.flips.decided, share, width))],
  ], [...found.models, noise]));

section("Their answers", `Greedy answers of at most ${count(found.conditions.answer_tokens)} tokens to ${count(found.conditions.prompts.count)} prompts (${found.conditions.prompts.from})${found.conditions.tasks ? `; problems: ${count(found.conditions.tasks.count)}, ${found.conditions.tasks.from}; the difference to full precision is in points, with its paired 95 % interval` : ""}.`,
  table([
    ["model", name],
    [`identical after ${AFTER} tokens`, (row) => (row.original ? null : plain(row.answers.survival[Math.min(AFTER, row.answers.survival.length - 1)], share))],
    ["identical to the end", (row) => (row.original ? null : plain(row.answers.identical, share))],
    ["come to their end", (row) => plain(row.answers.ended, share)],
    ["loop", (row) => plain(row.answers.loops, share)],
    ["repeated 4-grams", (row) => plain(row.answers.repeated, share)],
    ["thinking closes", (row) => plain(row.answers.thinking?.closed, share)],
    ["mean tokens", (row) => plain(row.answers.tokens.mean, (value) => value.toFixed(0))],
    ["problems solved", (row) => plain(row.tasks?.accuracy, share)],
    ["difference", (row) => (row.tasks && !row.original ? { sort: row.tasks.difference, text: points(row.tasks.difference), error: row.tasks.interval ? ` (${points(row.tasks.interval[0])} to ${points(row.tasks.interval[1])})` : "" } : null)],
    ["lost, gained", (row) => (row.tasks && !row.original ? { sort: row.tasks.lost, text: `${row.tasks.lost}, ${row.tasks.gained}` } : null)],
    ...(original.tasks?.pass_at_k?.values ?? []).map(({ k }, index) => [`pass@${k}`, (row) => plain(row.tasks.pass_at_k.values[index].value, share)]),
  ], found.models));

/** lm_eval's tasks; a group's parts are in the .json alone. */
function standardTasks(made) {
  const four = (value) => (Math.abs(value) < 1e4 ? Number(value.toPrecision(4)).toString() : count(Math.round(value)));
  const signed = (value) => `${value > 0 ? "+" : ""}${Math.abs(value) < 100 ? Number(value.toPrecision(2)) : count(Math.round(value))}`;
  const way = { true: " ↑", false: " ↓", null: "" };
  const called = ({ metric, filter, higher_is_better: up }) => `${metric}${filter === "none" ? "" : `, ${filter}`}${way[up]}`;
  const rows = original.lm_eval.flatMap((entry, place) => entry.metrics.flatMap((metric, index) => found.models.map((model) => (
    { name: model.name, color: model.color, task: entry.task, documents: entry.documents, metric: called(metric), is: model.lm_eval?.[place].metrics[index] ?? null }))));
  const examples = made.tasks.map((task) => `${task.task} ${task.few_shot === null ? "as its tasks have them" : task.few_shot}${task.from === "lm_eval" ? "" : ` (from ${task.from})`}`).join(", ");
  section("Standard tasks", `Run by lm_eval ${made.version}, ${made.limit === null ? "on all documents" : `on the first ${count(made.limit)} documents of each task`}, with its own defaults: prompts without a chat template, the task's own number of examples (${examples}). ↑: higher is better; ↓: lower. ± lm_eval's standard error over documents. The difference is to full precision; its 95 % interval is paired by documents, where the metric is a mean over them.${served.length ? ` –: not run on ${served.map((model) => model.name).join(", ")}, which a server has.` : ""}`,
    table([
      ["model", name],
      ["task", (row) => ({ sort: row.task, text: row.task }), "text"],
      ["metric", (row) => ({ sort: row.metric, text: row.metric }), "text"],
      ["documents", (row) => plain(row.documents, count)],
      ["value", (row) => (row.is && row.is.value !== null ? figure({ mean: row.is.value, standard_error: row.is.standard_error }, four, brief) : null)],
      ["difference", (row) => plain(row.is?.difference, signed)],
      ["95 % interval", (row) => (row.is?.interval ? { sort: row.is.interval[0], text: row.is.interval.map(signed).join(" to ") } : null)],
    ], rows));
}
if (found.conditions.lm_eval) standardTasks(found.conditions.lm_eval);

/** A series of bins for each model and for the noise floor; x is the middle of a bin, or its place. */
function binned(pick, { spots = null, low = -Infinity, high = Infinity, withNoise = true } = {}) {
  return [...measured, ...(withNoise ? [noise] : [])].map((model) => ({
    name: model.name, color: model.color, dashed: model === noise,
    points: pick(model.tokens).map((bin) => {
      const error = bin.figure.standard_error;
      const ends = error === null ? {} : { low: Math.max(low, bin.figure.mean - error), high: Math.min(high, bin.figure.mean + error) };
      return { x: spots ? spots.indexOf(bin.low) : (bin.low + bin.high) / 2, y: bin.figure.mean, from: bin.low, to: bin.high, ...ends };
    }),
  }));
}
const stretch = (x, point) => (point ? `tokens ${point.from} to ${point.to - 1}` : `token ${x}`);
const longest = Math.max(...others.map((model) => model.answers.survival.length));
const every = Math.max(1, Math.ceil(longest / 200));

section("Along an answer", measured.length ? `Every model reads full precision's own ${count(found.conditions.measured_on.tokens)} answer tokens and is asked for each next one; for "still identical" each answers by itself. Bands are one standard error over answers. The dashed line is full precision itself, computed in bfloat16: damage as small as that is mere rounding.` : "Each model answers by itself.",
  element("div", { class: "grid" },
    measured.length ? chart({ title: "Damage by position", note: "KL from full precision to the model. Does it grow as the answer goes on?", series: binned((t) => t.kl_by_position, { low: 0 }), xLabel: "position in the answer (tokens)", yLabel: "KL (nats a token, log)", log: true, format: nats, xFormat: stretch }) : null,
    chart({ title: "Answers still identical", note: "Each model answers by itself, greedily: the share that is full precision's so far.", series: others.map((model) => ({ name: model.name, color: model.color, step: true, points: model.answers.survival.map((y, x) => ({ x, y })).filter(({ x }) => x % every === 0) })), xLabel: "after so many tokens", yLabel: "share of answers", format: share, xFormat: (x) => `after ${x} tokens`, domain: [0, 1] }),
    measured.length ? chart({ title: "Agreement by position", note: "How often both find the same next token the likeliest.", series: binned((t) => t.top1_by_position, { high: 1 }), xLabel: "position in the answer (tokens)", yLabel: "same likeliest token", format: share, xFormat: stretch, domain: [Math.min(0.9, ...measured.flatMap((m) => m.tokens.top1_by_position.map((bin) => Math.floor(10 * (bin.figure.mean - (bin.figure.standard_error ?? 0))) / 10))), 1] }) : null,
    measured.length ? chart({ title: "How the damage is spread", note: "Most tokens lose nothing and few lose much: percentiles of KL over tokens.", series: [...measured, noise].map((model) => ({ name: model.name, color: model.color, dashed: model === noise, points: ["median", "p90", "p99"].map((key, x) => ({ x, y: model.tokens.kl[key] })) })), categories: ["median", "90 %", "99 %"], xLabel: "percentile of tokens", yLabel: "KL (nats, log)", log: true, format: nats }) : null));

/** What only log-probabilities show; nothing of it is known where no model has any. */
function probabilities() {
  const confidenceSpots = [...new Set([...measured, noise].flatMap((model) => model.tokens.kl_by_confidence.map((bin) => bin.low)))].sort((a, b) => a - b);
  const marginSpots = [...new Set([...measured, noise].flatMap((model) => model.tokens.flips.by_margin.map((bin) => bin.low)))].sort((a, b) => a - b);
  const diagonal = { name: "calibrated", color: "var(--s0)", dashed: true, quiet: true, points: [{ x: 0, y: 0 }, { x: 1, y: 1 }] };
  function reliability(at, title, note) {
    const series = measured.filter((model) => model.tokens.confidence[at]).map((model) => ({ name: model.name, color: model.color, points: model.tokens.confidence[at].bins.map((bin) => ({ x: bin.confidence, y: bin.backing })) }));
    return chart({ title, note, series: [...series, diagonal], xLabel: "the model's confidence in its likeliest token", yLabel: "probability by full precision", format: share, xFormat: (x) => `confidence ${share(x)}`, domain: [0, 1] });
  }

  section("Sure and unsure", "Where full precision hesitates a change is often harmless; where it is sure hardly ever.",
    element("div", { class: "grid" },
      chart({ title: "Damage by full precision's confidence", note: "KL at tokens to whose likeliest choice full precision gives so much probability.", series: binned((t) => t.kl_by_confidence, { spots: confidenceSpots, low: 0 }), categories: confidenceSpots.map(from), xLabel: "full precision's confidence, from", yLabel: "KL (nats a token, log)", log: true, format: nats }),
      chart({ title: "Flipped tokens by margin", note: "Share of tokens where another becomes the likeliest, by how far full precision's first choice leads its second.", series: binned((t) => t.flips.by_margin, { spots: marginSpots, low: 0 }), categories: marginSpots.map(from), xLabel: "full precision's margin, from", yLabel: "share that flips", format: share }),
      reliability("all", "Is its confidence still worth it?", "How likely full precision finds what the model is so confident of. Below the line: overconfident."),
      reliability("high_entropy", "And where the text could go either way?", "The same at the fifth of tokens of highest entropy, where reasoning forks.")),
    table([
      ["model", name],
      ["where", (row) => ({ sort: row.where, text: row.where }), "text"],
      ["tokens", (row) => plain(row.at.tokens, count)],
      ["KL, nats a token", (row) => { const kl = figure(row.at.kl, nats); return row.coarse ? { ...kl, text: `≥ ${kl.text}` } : kl; }],
      ["same likeliest token", (row) => figure(row.at.agrees, share)],
      ["overconfidence (points)", (row) => figure(row.at.overconfidence, points, width)],
      ["calibration error (points)", (row) => plain(row.at.error, width)],
    ], measured.flatMap((model) => Object.entries({ all: "all tokens", low_entropy: "low entropy", high_entropy: "highest entropy, a fifth", turns: "turns (Wait, But ...)" })
      .filter(([key]) => model.tokens.confidence[key])
      .map(([key, where]) => ({ name: model.name, color: model.color, where, coarse: model.tokens.coarse, at: model.tokens.confidence[key] })))));

  const ended = (kind, side) => (row) => (row.tokens.endings[kind] ? plain(row.tokens.endings[kind][side], share) : null);
  section("Where full precision ends", "The probability of the token that ends the turn, or the thinking block, at the places where full precision writes it. A model that gives it too little goes on and on.",
    table([
      ["model", name],
      ["ends of turns", (row) => (row.tokens.endings.turn ? plain(row.tokens.endings.turn.places, count) : null)],
      ["full precision gives", ended("turn", "original")], ["the model gives", ended("turn", "model")],
      ["ends of thinking", (row) => (row.tokens.endings.thinking ? plain(row.tokens.endings.thinking.places, count) : null)],
      ["full precision gives ", ended("thinking", "original")], ["the model gives ", ended("thinking", "model")],
    ], measured));

  section("Decisions overturned", "The flips at which full precision was the surest of its own token: what stood before, what each side would write next.",
    table([
      ["model", name],
      ["after", (row) => ({ sort: row.before, text: `… ${row.before.trim()}` }), "text"],
      ["full precision", (row) => ({ sort: row.original, text: JSON.stringify(row.original) }), "text"],
      ["gives it", (row) => plain(row.original_probability, share)],
      ["model", (row) => ({ sort: row.model, text: JSON.stringify(row.model) }), "text"],
      ["gives it ", (row) => plain(row.model_probability, share)],
      ["position", (row) => plain(row.position, count)],
    ], measured.flatMap((model) => model.tokens.flips.worst.map((flip) => ({ ...flip, name: model.name, color: model.color })))));
}
if (measured.length) probabilities();

function answer(model, text, note, first) {
  const words = element("p", { class: "words", tabindex: 0 });
  if (first === undefined) words.append(text);
  else {
    const [, mark, rest] = /^(\s*\S*)([\s\S]*)$/.exec(text.rest);
    words.append(element("span", { class: "same" }, text.same), ...(first === null ? [] : [element("mark", {}, mark || "(ends here)"), rest]));
  }
  return element("div", { color: model.color }, element("h4", {}, model.name), element("p", { class: "note" }, note), words);
}
const length = (one) => `${count(one.tokens)} tokens${one.ended ? "" : ", cut off"}`;
section("Answers side by side", `Greedy answers to the same prompt${found.answers.length < found.conditions.prompts.count ? `, the first ${found.answers.length} of ${count(found.conditions.prompts.count)}` : ""}. What is the same as in full precision is grey; the first difference is marked.`,
  ...found.answers.map((entry, index) => element("details", index ? {} : { open: "" },
    element("summary", {}, entry.prompt),
    element("div", { class: "columns" },
      answer(original, entry.original.text, length(entry.original)),
      ...entry.models.map((one, place) => answer(others[place], one, `${length(one)}, ${one.first_different === null ? "identical" : `differs from token ${count(one.first_different + 1)} on`}`, one.first_different))))));

const made = found.conditions;
footer({
  made: found.made, original: original.name,
  prompts: `${count(made.prompts.count)}, ${made.prompts.from}`,
  tasks: made.tasks ? `${count(made.tasks.count)}, ${made.tasks.from}, answers found by ${made.tasks.extractor}` : "none",
  ...(made.lm_eval ? { "standard tasks": `lm_eval ${made.lm_eval.version}: ${made.lm_eval.tasks.map((task) => `${task.task} version ${task.version}, ${count(task.documents)} documents`).join("; ")}; in ${made.answers_dtype}, log-probabilities in ${made.lm_eval.log_probabilities_dtype}; its own seeds` } : {}),
  "measured on": `${count(made.measured_on.tokens)} tokens of full precision's ${made.measured_on.temperature ? `answers at temperature ${made.measured_on.temperature}` : "greedy answers"}, in ${made.measured_dtype}`,
  answers: `greedy, in ${made.answers_dtype}, at most ${count(made.answer_tokens)} tokens, on ${made.device}`,
  ...(served.length ? { served: served.map(({ name: called, served: how }) => `${called}, by ${how.address}; prompts sent as ${how.prompts}; ${how.likeliest === null ? "no log-probabilities of a prompt" : `${how.likeliest} tokens named at each position`}; tokens of answers by ${how.answer_tokens_by === "server" ? "the server" : "their text"}`).join("; ") } : {}),
  seed: String(made.seed), versions: Object.entries(made.versions).map(([key, value]) => `${key} ${value}`).join(", "),
});
