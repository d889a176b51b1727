// Elements, numbers and texts. Every text of a record reaches the page as textContent, never as markup.

const REPORT = JSON.parse(document.getElementById("data").textContent);
const SVG_NAMESPACE = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** An HTML element. */
function h(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** An SVG element. */
function s(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG_NAMESPACE, name), attributes, children);
}

// --- the data ---------------------------------------------------------------------------------------------

const CELLS = REPORT.cells;
const BY_NAME = new Map(CELLS.map((cell) => [cell.name, cell]));
const MODELS = unique(CELLS.map((cell) => cell.model));
const TASKS = unique(CELLS.map((cell) => cell.task)).sort((a, b) => (a === "none") - (b === "none"));
const VERDICTS = Object.keys(REPORT.wording.verdicts);

function unique(items) {
  return [...new Set(items)];
}

/** A table held by columns, as objects. Made once. */
function rows(cell, name) {
  const table = cell[name];
  if (!table) return [];
  if (!table.made) {
    const columns = Object.keys(table).filter((key) => key !== "rows");
    const values = columns.map((key) => {
      const column = table[key];
      if (typeof column === "number") return REPORT.pool[column];
      return REPORT.pool[column.at].map((place) => (place === null ? null : column.texts[place]));
    });
    const made = Array.from({ length: table.rows }, (_, row) =>
      Object.fromEntries(columns.map((key, place) => [key, values[place][row]])));
    Object.defineProperty(table, "made", { value: made });
  }
  return table.made;
}

/** The value of a metric for one head; null where there is none. */
function value(cell, metric, layer, head) {
  const values = column(cell, metric);
  return values ? values[layer * cell.heads + head] : null;
}

function column(cell, metric) {
  return metric in cell.columns ? REPORT.pool[cell.columns[metric]] : null;
}

/** Why a metric has no value, for a head or for all. */
function whyMissing(cell, metric, layer) {
  if (cell.unavailable[metric]) return cell.unavailable[metric];
  if (!cell.columns_there.includes(metric)) return `analysis ${cell.analysis} does not compute it`;
  if (REPORT.metrics[metric].later_layers && layer === 0) return "it exists only in layers after the first";
  return "it has no value for this head";
}

/** Cells of the same weights and processing, this one first: they share all results that depend on no task. */
function siblings(cell) {
  return [cell, ...CELLS.filter((other) => other !== cell && other.weights === cell.weights && other.model === cell.model)];
}

/** This cell or a sibling that has a table. */
function having(cell, table) {
  return siblings(cell).find((other) => other[table]) || null;
}

function headLabel(row) {
  return `${row.layer}.${row.head}`;
}

function isHead(row, layer, head) {
  return row.layer === layer && row.head === head;
}

/** "3.4" -> verdict rows of that head. */
function claimed(cell) {
  const found = new Map();
  for (const row of rows(cell, "verdicts")) {
    if (row.kind === "head") found.set(headLabel(row), [...(found.get(headLabel(row)) || []), row]);
  }
  return found;
}

/** Whether a candidate's role is ranked by this row's metric: by its primary one unless another ranks it. */
function ranks(row) {
  return row.ranked ?? row.primary;
}

function candidates(cell) {
  const found = new Map();
  for (const row of rows(cell, "candidates")) {
    if (!ranks(row)) continue;
    found.set(headLabel(row), [...(found.get(headLabel(row)) || []), row]);
  }
  return found;
}

function headLink(cell, label) {
  return `#head/${cell.name}/${label}`;
}

function roleName(role) {
  return REPORT.roles[role] ? REPORT.roles[role].name : role;
}

function roleShort(role) {
  return REPORT.roles[role] ? REPORT.roles[role].short : role;
}

function metricTitle(name) {
  return REPORT.metrics[name] ? REPORT.metrics[name].title : REPORT.wording.pair_metrics[name] || name;
}

/** A metric and the sign of its predicted direction. */
function predictedTitle(name, direction) {
  return `${metricTitle(name)} ${REPORT.wording.arrows[direction]}`;
}

function nullName(name) {
  return REPORT.wording.nulls[name] || name;
}

function verdictName(name) {
  return REPORT.wording.verdicts[name] || name;
}

// --- numbers ----------------------------------------------------------------------------------------------

const isNumber = (x) => typeof x === "number" && Number.isFinite(x);
const minus = (text) => text.replace(/^-/, "−");

/** A finite number with so many decimals. Of two that are equally near, the one that ends in an even digit, as in Python. */
function fixed(x, decimals) {
  const text = x.toFixed(decimals); // of two that are equally near, the one farther from 0
  const isTie = Math.abs((x * 2 ** (decimals + 1)) % 2) === 1; // powers of two multiply without rounding
  const isOdd = Number(text.at(-1)) % 2 === 1;
  return isTie && isOdd ? (x - Math.sign(x) * 0.25 * 10 ** -decimals).toFixed(decimals) : text;
}

/** A number with so many decimals, and no more than the four digits that this page holds. */
function number(x, decimals = 2) {
  if (!isNumber(x)) return "unavailable";
  const digits = Math.max(0, Math.min(decimals, 3 - Math.floor(Math.log10(Math.abs(x) || 1))));
  if (x !== 0 && Math.abs(x) < 0.5 * 10 ** -digits) return minus(x.toPrecision(1));
  return minus(fixed(x, digits));
}

function probability(x) {
  if (!isNumber(x)) return "";
  return x >= 0.0995 ? fixed(x, 2) : x >= 0.00095 ? fixed(x, 3) : x.toExponential(0);
}

function percent(x) {
  return isNumber(x) ? `${minus(fixed(100 * x, 0).replace(/^-0$/, "0"))} %` : "unavailable";
}

function plural(n, one, many = `${one}s`) {
  return `${n} ${n === 1 ? one : many}`;
}

function sentenceList(items) {
  return items.length < 2 ? items.join("") : `${items.slice(0, -1).join(", ")} and ${items[items.length - 1]}`;
}

// --- texts of tokenizers ----------------------------------------------------------------------------------

const LONG = 30;
const UNSEEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]/u;

/** A token as text that cannot change the page: isolated from the direction around it, what has no picture escaped. */
function token(text) {
  const node = h("bdi", { class: "token", title: visible(text) });
  const letters = [...text];
  letters.slice(0, LONG).forEach((letter, place) => {
    if (letter === " " && (place === 0 || place === letters.length - 1)) node.append(h("span", { class: "space" }, "␣"));
    else if (UNSEEN.test(letter)) node.append(h("span", { class: "escaped" }, escaped(letter)));
    else node.append(letter);
  });
  if (letters.length > LONG) node.append("…");
  if (!letters.length) node.append(h("span", { class: "space" }, "(empty)"));
  return node;
}

function visible(text) {
  return [...text].map((letter) => (UNSEEN.test(letter) ? escaped(letter) : letter)).join("");
}

function escaped(letter) {
  const names = { "\n": "\\n", "\r": "\\r", "\t": "\\t" };
  return names[letter] || `\\u{${letter.codePointAt(0).toString(16)}}`;
}

// --- small parts ------------------------------------------------------------------------------------------

/** The mark of a verdict: its shape says what its colour says. */
function glyph(verdict) {
  const colour = shade(REPORT.palette.verdicts[verdict] || REPORT.palette.verdicts.untestable);
  const line = { fill: "none", stroke: colour, "stroke-width": 2 };
  const shapes = {
    corroborated: () => [s("circle", { cx: 7, cy: 7, r: 6, fill: colour })],
    partial: () => [s("circle", { cx: 7, cy: 7, r: 5.2, ...line }), s("path", { d: "M7 1.8 A5.2 5.2 0 0 0 7 12.2 Z", fill: colour })],
    consistent: () => [s("path", { d: "M7 1.6 L12.4 7 L7 12.4 L1.6 7 Z", ...line })],
    unsupported: () => [s("circle", { cx: 7, cy: 7, r: 5.2, ...line })],
    contradicted: () => [s("path", { d: "M2 2 L12 12 M12 2 L2 12", ...line, "stroke-width": 3 })],
    untestable: () => [s("path", { d: "M1.5 7 H12.5", ...line, "stroke-width": 2.5 })],
    out_of_scope: () => [s("circle", { cx: 7, cy: 7, r: 2.2, fill: colour })],
  };
  return s("svg", { class: "glyph", viewBox: "0 0 14 14", "aria-hidden": "true" }, (shapes[verdict] || shapes.untestable)());
}

function verdictText(row) {
  return verdictName(row.verdict) + (row.flags ? ` (${row.flags})` : "");
}

/** A verdict with its mark; what its flags say is its title. */
function verdict(row) {
  const name = verdictName(row.verdict);
  const flags = [name, ...(row.flags || "").split(" ").map((flag) => `${name} (${flag})`)].map((flagged) => REPORT.wording.flags[flagged]).filter(Boolean);
  return h("span", { class: "verdict", title: flags.join("; ") || null }, glyph(row.verdict), verdictText(row));
}

function legend(there) {
  return h("div", { class: "legend" }, VERDICTS.filter((name) => there.has(name)).map((name) =>
    h("span", { class: "verdict" }, glyph(name), verdictName(name))));
}

/** A drop-down list: [value, label] pairs, or {label, options} groups of them. */
function select(label, options, chosen, change) {
  const option = ([key, text]) => h("option", { value: key, selected: key === chosen }, text);
  const list = options.map((item) => (Array.isArray(item) ? option(item) : h("optgroup", { label: item.label }, item.options.map(option))));
  return h("label", {}, h("span", {}, label), h("select", { onchange: (event) => change(event.target.value) }, list));
}

function missing(reason) {
  return h("p", { class: "missing" }, `unavailable: ${reason}`);
}

function facts(pairs) {
  return h("dl", { class: "facts" }, pairs.filter(([, what]) => what !== null && what !== undefined && what !== "")
    .map(([name, what]) => [h("dt", {}, name), h("dd", {}, what)]));
}

/** A table of texts and numbers: the text alternative of a figure. */
function dataTable(titles, lines, caption) {
  const cell = (item) => h("td", { class: isNumber(item) ? "number" : null }, item === null ? "unavailable" : isNumber(item) ? number(item, 4) : item);
  return h("table", { class: "data" }, caption ? h("caption", {}, caption) : null,
    h("thead", {}, h("tr", {}, titles.map((title) => h("th", { scope: "col" }, title)))),
    h("tbody", {}, lines.map((line) => h("tr", {}, line.map(cell)))));
}
