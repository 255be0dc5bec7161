"use strict";
// Figures as text, and tables that sort by the column whose head is pressed.

const count = (value) => value.toLocaleString("en");
const nats = (value) => (value === 0 ? "0" : Math.abs(value) < 1e-4 ? value.toExponential(0) : Number(value.toPrecision(3)).toString());
const brief = (value) => (value === 0 ? "0" : Math.abs(value) < 1e-4 ? value.toExponential(0) : Number(value.toPrecision(2)).toString());
const share = (value, tick) => `${(100 * value).toFixed(tick ? 0 : 1)} %`;
const points = (value) => { const text = (100 * value).toFixed(1).replace(/^-0\.0$/, "0.0"); return value > 0 && text !== "0.0" ? `+${text}` : text; };
const from = (low) => `${Math.round(100 * low)} %+`;
const width = (value) => (100 * value).toFixed(1);
const size = (bytes) => (bytes >= 1e9 ? `${(bytes / 1e9).toFixed(2)} GB` : `${(bytes / 1e6).toFixed(1)} MB`);
const figure = (value, format, spread = format) => (value === null ? null : { sort: value.mean, text: format(value.mean), error: value.standard_error === null ? "" : ` ± ${spread(value.standard_error)}` });
const plain = (value, format) => (value === null || value === undefined ? null : { sort: value, text: format(value) });

function section(title, note, ...parts) {
  document.getElementById("report").append(element("section", {}, element("h2", {}, title), element("p", { class: "note" }, note), ...parts));
}

/** A table that sorts by the column whose head is pressed. columns: [[head, cell of a row]]; the first is its name. */
function table(columns, rows) {
  const used = columns.filter(([, cell]) => rows.some((row) => cell(row) !== null));
  const body = element("tbody", {}, ...rows.map((row) => {
    const line = element("tr");
    used.forEach(([, cell, kind], index) => {
      const value = cell(row);
      const made = element(index ? "td" : "th", index ? { class: kind } : { scope: "row", color: row.color, class: "text" });
      if (value === null) made.append("–");
      else if (kind === "text") made.append(element("code", {}, value.text));
      else made.append(value.text, ...(value.error ? [element("span", { class: "error" }, value.error)] : []));
      made.sortKey = value === null ? null : value.sort;
      line.append(made);
    });
    return line;
  }));
  const heads = used.map(([head, , kind], index) => {
    const button = element("button", { type: "button" }, head);
    const cell = element("th", { scope: "col", class: kind }, button);
    button.addEventListener("click", () => sort(cell, index));
    return cell;
  });
  function sort(cell, index) {
    const down = cell.getAttribute("aria-sort") === "ascending";
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    cell.setAttribute("aria-sort", down ? "descending" : "ascending");
    const order = (one, other) => (typeof one === "string" ? one.localeCompare(other) : one - other) * (down ? -1 : 1);
    const lines = [...body.children].sort((one, other) => {
      const [a, b] = [one.children[index].sortKey, other.children[index].sortKey];
      return a === null || b === null ? (a === null) - (b === null) : order(a, b);
    });
    body.replaceChildren(...lines);
  }
  return element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "a table, wider than some screens" }, element("table", {}, element("thead", {}, element("tr", {}, ...heads)), body));
}

/** What the page is made from, at its foot. */
function footer(facts) {
  document.getElementById("footer").append(element("dl", {}, ...Object.entries(facts).flatMap(([key, value]) => [element("dt", {}, key), element("dd", {}, value)])));
}
