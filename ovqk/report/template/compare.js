// Compare: models beside each other, by verdict, by effect, and along their depth.

const chosen = { models: new Set(MODELS), tasks: new Set(TASKS), verdict: "", text: "", sort: ["task", 1], dots: true, name: "" };
const MANY = 12; // models whose boxes and lines one can still tell apart

function comparePage() {
  const content = h("div");
  const draw = () => content.replaceChildren(...compareContent().filter(Boolean));
  draw();
  return [
    h("h1", { tabindex: -1 }, CELLS.some(judged) ? "Do the weights bear out the claims?" : "Which heads are strongest for each role?"),
    h("p", { class: "lead" }, summary()),
    compareControls(draw),
    content,
  ];
}

function summary() {
  const roles = CELLS.flatMap((cell) => rows(cell, "verdicts").filter((row) => row.kind === "role"));
  const counts = VERDICTS.map((name) => [name, roles.filter((row) => row.verdict === name).length]).filter(([, n]) => n);
  const tasks = TASKS.filter((task) => task !== "none");
  const lost = REPORT.failures.length ? `, and ${plural(REPORT.failures.length, "cell")} without results` : "";
  const size = `${plural(CELLS.length, "cell")} of ${plural(MODELS.length, "model")}${tasks.length ? ` and ${plural(tasks.length, "task")}` : ""}${lost}. `;
  if (!roles.length) return `${size}No circuit is claimed for any of them, so there is nothing to judge. The strongest heads for each role are candidates: places to look first, and no findings. Every head is in the atlas.`;
  return `${size}${plural(roles.length, "role")} with claimed heads: ${sentenceList(counts.map(([name, n]) => `${n} ${verdictName(name)}`))}.`;
}

function compareControls(draw) {
  const chips = (title, items, set, mark) => h("fieldset", {}, h("legend", {}, title), items.map((item) => h("label", { class: "chip" },
    h("input", { type: "checkbox", checked: set.has(item), onchange: (event) => { set[event.target.checked ? "add" : "delete"](item); draw(); } }),
    mark ? mark(item) : null, item)));
  const swatch = (model) => {
    const node = h("i", { class: "swatch" });
    node.style.borderTopColor = look(model).stroke;
    node.style.borderTopStyle = look(model).dash ? "dashed" : "solid";
    return node;
  };
  const boxes = chips("Models", MODELS, chosen.models, swatch);
  const models = MODELS.length <= MANY ? boxes : [
    h("label", {}, "Models named like", h("input", { type: "search", id: "named", value: chosen.name, oninput: (event) => { chosen.name = event.target.value.trim().toLowerCase(); draw(); } })),
    h("details", {}, h("summary", {}, `choose among ${plural(MODELS.length, "model")}`), boxes)];
  return h("div", { class: "controls" }, models, TASKS.length > 1 ? chips("Tasks", TASKS, chosen.tasks) : null);
}

function chosenCells() {
  return CELLS.filter((cell) => chosen.models.has(cell.model) && chosen.tasks.has(cell.task) && named(cell.model));
}

/** Whether a model is one of those whose names were asked for. */
function named(model) {
  return model.toLowerCase().includes(chosen.name);
}

function judged(cell) {
  return rows(cell, "verdicts").length > 0;
}

function compareContent() {
  const cells = chosenCells();
  const found = candidateTables(cells.filter((cell) => !judged(cell)));
  const depth = [...byFrequency(cells), h("h2", {}, "Along the depth"), ...depthCurves(cells)];
  if (!CELLS.some(judged)) return [...found, ...lostElsewhere(), ...promptsOverview(cells), ...depth];
  return [h("h2", {}, "Verdicts"), ...verdictMatrix(cells), ...lostElsewhere(), ...promptsOverview(cells), h("h2", {}, "Effects"), ...effects(cells), ...found, ...depth];
}

/** A figure of each cell whose task's words are a cycle. */
function byFrequency(cells) {
  const drawn = cells.filter((cell) => cell.frequencies);
  if (!drawn.length) return [];
  return [h("h2", {}, "By frequency"), h("p", { class: "small" }, "The words of the task are a cycle. Bars: the power of the embeddings at each frequency. Rows: the share of a head's OV that goes from a frequency to itself, and of its keys; the darker, the more. A mark at a row's end is its verdict: keys are of one frequency, OV moves that same one."),
    ...drawn.map((cell) => h("figure", {}, h("img", { class: "drawn", src: cell.frequencies.address, alt: cell.frequencies.description })))];
}

/** The message of each cell without results of a task that no other cell has: no table has a place for it. */
function lostElsewhere() {
  return REPORT.failures.filter((one) => !TASKS.includes(one.task) && named(one.model)).map((one) =>
    h("p", { class: "small lost" }, `${one.model} / ${one.task} / ${one.analysis} without results: ${one.error}`));
}

// --- candidates -------------------------------------------------------------------------------------------

const FIRST = 3; // candidates of each role

/** For each task a table of models x roles: the strongest heads of models for which nothing is claimed. */
function candidateTables(cells) {
  const with_some = cells.filter((cell) => candidates(cell).size);
  const tasks = TASKS.filter((task) => with_some.some((cell) => cell.task === task));
  return tasks.flatMap((task) => [h("h2", {}, `Candidates: ${task}`), h("div", { class: with_some.length > MANY ? "scroll low" : "scroll" }, candidatesOf(task, with_some.filter((cell) => cell.task === task)))]);
}

function candidatesOf(task, cells) {
  const ranked = (cell) => rows(cell, "candidates").filter((row) => ranks(row) && row.rank <= FIRST);
  const roles = unique(cells.flatMap((cell) => ranked(cell).map((row) => row.role)));
  const lost = REPORT.failures.filter((one) => one.task === task && chosen.tasks.has(task) && named(one.model));
  return h("table", { class: "matrix wide candidates" },
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "model"), roles.map((role) => h("th", { scope: "col" }, roleName(role))))),
    h("tbody", {},
      cells.map((cell) => h("tr", {}, h("th", { scope: "row", class: cell.label.length < 22 ? "whole" : null }, cell.label), roles.map((role) => h("td", { "data-label": roleName(role) },
        ranked(cell).filter((row) => row.role === role).map((row) => candidateMark(cell, row)))))),
      lost.map((one) => h("tr", {}, h("th", { scope: "row" }, one.model), h("td", { colspan: Math.max(1, roles.length), class: "small" }, `without results: ${one.error}`)))));
}

function candidateMark(cell, row) {
  const label = headLabel(row);
  return [tip(h("a", { class: "mark", href: headLink(cell, label), "aria-label": `head ${label}, candidate for ${roleName(row.role)}` }, label, h("span", { class: "muted small" }, ` ${number(row.value)}`)),
    `${label}: candidate for ${roleName(row.role)}\n${row.metric} ${REPORT.wording.arrows[row.prediction]} ${number(row.value)}`), " "];
}

// --- verdicts ---------------------------------------------------------------------------------------------

/** Models x tasks: every claimed head under its role, with the mark of its verdict. */
function verdictMatrix(cells) {
  const asked = cells.filter((cell) => cell.task !== "none");
  const models = unique(cells.filter((cell) => asked.includes(cell) || !asked.some((other) => other.model === cell.model)).map((cell) => cell.label));
  const lost = unique(REPORT.failures.map((one) => one.model)).filter((model) => !MODELS.includes(model) && named(model));
  const tasks = TASKS.filter((task) => task !== "none" && cells.some((cell) => cell.task === task));
  if (!tasks.length) return [h("p", { class: "muted" }, "None of the chosen tasks claims heads.")];
  const there = new Set(cells.flatMap((cell) => rows(cell, "verdicts").map((row) => row.verdict)));
  const table = h("table", { class: "matrix wide", id: "matrix" },
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "model"), tasks.map((task) => h("th", { scope: "col" }, task)))),
    h("tbody", {}, [...models, ...lost].map((model) => h("tr", {}, h("th", { scope: "row", class: model.length < 22 ? "whole" : null }, model), tasks.map((task) => {
      const cell = cells.find((one) => one.label === model && one.task === task);
      return h("td", { "data-label": task }, cell ? matrixCell(cell) : matrixGap(model, task));
    })))));
  return [
    h("p", { class: "note" }, "Each claimed head stands under its role. The mark before a role is the verdict on its heads together; the mark before a head is the verdict on that head alone. Bars count, by verdict, the heads that could be corroborated; how many could not, whatever their weights, stands beside. A verdict is about the weights: it does not say that the model does so on task inputs."),
    legend(there),
    h("div", { class: "scroll" }, table),
  ];
}

function matrixCell(cell) {
  const found = rows(cell, "verdicts");
  if (!found.length) return h("span", { class: "muted small" }, "no claims", candidates(cell).size ? [", ", h("a", { href: `#circuit/${cell.name}` }, "candidates")] : "");
  return [countBar(found.filter((row) => row.kind === "head")), ...found.filter((row) => row.kind === "role").map((role) => h("div", { class: "role-line" },
    h("div", { class: "name" }, glyph(role.verdict), tip(h("a", { href: `#circuit/${cell.name}`, class: "mark" }, roleName(role.role)), `${roleName(role.role)}: ${verdictText(role)}`)),
    h("div", { class: "heads" }, found.filter((row) => row.kind === "head" && row.role === role.role).map((row) => headMark(cell, row)))))];
}

/** What stands for a missing cell: whether it was not run, or is without results. */
function matrixGap(label, task) {
  const model = CELLS.find((one) => one.label === label)?.model ?? label;
  const lost = REPORT.failures.find((one) => one.model === model && one.task === task);
  if (!lost) return h("span", { class: "muted small" }, "not run");
  return [tip(h("a", { href: "#provenance", class: "small" }, "without results"), lost.error), h("span", { class: "muted small" }, `: ${clipped(lost.error, 120)}`)];
}

/** How many heads have each verdict, of those that could be corroborated, as one bar of parts; and how many could not. */
function countBar(all) {
  const heads = all.filter((row) => row.decidable);
  const rest = all.length - heads.length;
  const note = rest ? h("span", { class: "muted small" }, heads.length ? ` ${rest} more could not be corroborated` : `none of ${plural(rest, "head")} could be corroborated alone`) : null;
  if (!heads.length) return note;
  const counts = VERDICTS.map((name) => [name, heads.filter((row) => row.verdict === name).length]).filter(([, n]) => n);
  const [width, height] = [176, 17];
  const said = counts.map(([name, n]) => `${n} ${verdictName(name)}`).join(", ");
  let x = 0;
  return [tip(s("svg", { class: "plot counts", viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `heads: ${said}` }, counts.map(([name, n]) => {
    const part = (width * n) / heads.length;
    const fill = shade(REPORT.palette.verdicts[name]);
    const drawn = [
      s("rect", { x: x + 0.75, y: 0.75, width: Math.max(1, part - 1.5), height: height - 1.5, rx: 2.5, fill }),
      part > 11 ? s("text", { x: x + part / 2, y: 12.5, "text-anchor": "middle", style: `font-size:11px;font-weight:600;fill:${inkOn(fill)}` }, n) : null,
    ];
    x += part;
    return drawn;
  })), said), note];
}

function headMark(cell, row) {
  const label = headLabel(row);
  return tip(h("a", { class: "mark", href: headLink(cell, label), "aria-label": `head ${label}, ${roleName(row.role)}: ${verdictText(row)}` }, glyph(row.verdict), label),
    `${label} ${roleName(row.role)}\n${verdictText(row)}${row.reason ? `: ${row.reason}` : ""}`);
}

// --- effects ----------------------------------------------------------------------------------------------

const EFFECT_COLUMNS = [
  { key: "task", title: "task" },
  { key: "role", title: "role" },
  { key: "model", title: "model" },
  { key: "heads", title: "heads", number: true },
  { key: "primary", title: "primary metric" },
  { key: "effect", title: "AUC within layer", number: true },
  { key: "q", title: "q", number: true },
  { key: "verdict", title: "verdict" },
];

function effectRows(cells) {
  return cells.flatMap((cell) => {
    const found = rows(cell, "verdicts");
    return found.filter((row) => row.kind === "role").map((row) => ({
      ...row, cell, model: cell.model, task: cell.task, place: VERDICTS.indexOf(row.verdict),
      heads: found.filter((other) => other.kind === "head" && other.role === row.role).length,
    }));
  });
}

function effects(cells) {
  const all = effectRows(cells);
  if (!all.length) return [h("p", { class: "muted" }, "None of the chosen cells has a claimed role.")];
  const box = h("div", { class: "scroll" });
  const draw = () => box.replaceChildren(effectTable(all));
  draw();
  const note = "AUC within layer: the chance that a claimed head is more extreme, in the predicted direction, than another head of its layer; 0.5 is chance. Whiskers: 95 % under resampled task words. A row without whiskers has a metric that does not depend on words. q: the largest corrected p under the nulls that count.";
  const flagged = Object.entries(REPORT.wording.flags).filter(([name]) => all.some((row) => verdictText(row) === name)).map(([name, says]) => ` ${name}: ${says}.`);
  return [
    h("p", { class: "note" }, note, flagged),
    h("div", { class: "controls" },
      h("label", {}, h("span", {}, "Filter"), h("input", { type: "search", value: chosen.text, id: "filter", placeholder: "role, model, metric …", oninput: (event) => { chosen.text = event.target.value; draw(); } })),
      select("Verdict", [["", "any"], ...VERDICTS.map((name) => [name, verdictName(name)])], chosen.verdict, (name) => { chosen.verdict = name; draw(); })),
    box,
  ];
}

function effectTable(all) {
  const words = chosen.text.toLowerCase().split(/\s+/).filter(Boolean);
  const text = (row) => [row.task, roleName(row.role), row.model, row.primary, metricTitle(row.primary), row.verdict, row.flags].join(" ").toLowerCase();
  const shown = all.filter((row) => (!chosen.verdict || row.verdict === chosen.verdict) && words.every((word) => text(row).includes(word)));
  const [key, direction] = chosen.sort;
  const order = (row) => (key === "verdict" ? row.place : key === "role" ? roleName(row.role) : row[key]);
  shown.sort((a, b) => {
    const [x, y] = [order(a), order(b)];
    if (x === y) return 0;
    if (x === null || x === undefined) return 1; // what is unavailable comes last either way
    if (y === null || y === undefined) return -1;
    return (x < y ? -1 : 1) * direction;
  });
  const head = h("tr", {}, EFFECT_COLUMNS.map((column) => h("th", {
    scope: "col", class: column.number && column.key !== "effect" ? "number" : null,
    "aria-sort": key === column.key ? (direction > 0 ? "ascending" : "descending") : "none",
  }, h("button", { type: "button", onclick: (event) => resort(event, column.key, all) }, column.title), column.key === "effect" ? effectAxis() : null)));
  return h("table", { class: "wide", id: "effects" }, h("thead", {}, head),
    h("tbody", {}, shown.map(effectRow)),
    shown.length ? null : h("tfoot", {}, h("tr", {}, h("td", { colspan: EFFECT_COLUMNS.length, class: "muted" }, "Nothing matches the filter."))));
}

function resort(event, key, all) {
  chosen.sort = [key, chosen.sort[0] === key ? -chosen.sort[1] : 1];
  const box = event.target.closest(".scroll");
  box.replaceChildren(effectTable(all));
  box.querySelectorAll("th button")[EFFECT_COLUMNS.findIndex((column) => column.key === key)].focus();
}

const EFFECT_WIDTH = 210;
const effectX = linear([0, 1], [8, EFFECT_WIDTH - 8]);

function effectAxis() {
  return s("svg", { class: "plot", viewBox: `0 0 ${EFFECT_WIDTH} 18`, width: EFFECT_WIDTH, height: 18, "aria-hidden": "true" },
    [0, 0.5, 1].map((x) => s("text", { class: "tick", x: effectX(x), y: 14, "text-anchor": "middle" }, x === 0.5 ? "0.5: chance" : tickText(x))));
}

function effectRow(row) {
  return h("tr", {},
    h("td", {}, row.task),
    h("td", { class: "whole" }, h("a", { href: `#circuit/${row.cell.name}` }, roleName(row.role))),
    h("td", { class: "whole" }, row.cell.label, row.cell.analysis === "b03" || row.cell.label !== row.cell.model ? null : h("span", { class: "muted" }, ` ${row.cell.analysis}`)),
    h("td", { class: "number" }, row.heads),
    h("td", { class: "small" }, row.primary ? tip(h("span", {}, predictedTitle(row.primary, row.prediction)), row.primary) : h("span", { class: "muted" }, "none")),
    h("td", {}, isNumber(row.effect) ? effectBar(row) : h("span", { class: "missing small" }, `unavailable: ${shortReason(row.reason)}`)),
    h("td", { class: "number" }, probability(row.q)),
    h("td", { class: "small says-verdict" }, tip(verdict(row), row.reason || row.establishes || "")));
}

/** "its primary metric, m, is unavailable: because" -> "because". */
function shortReason(reason) {
  return (reason || "no other head of its layers has a value").replace(/^.* is unavailable: /, "");
}

function effectBar(row) {
  const colour = shade(REPORT.palette.verdicts[row.verdict]);
  const interval = isNumber(row.ci_low) && isNumber(row.ci_high);
  const label = `AUC ${number(row.effect)}${interval ? `, 95 % interval ${number(row.ci_low)} to ${number(row.ci_high)}` : ", no interval"}`;
  return tip(svg(EFFECT_WIDTH, 22, label,
    [0, 0.5, 1].map((x) => s("line", { class: x === 0.5 ? "reference" : "gridline", x1: effectX(x), x2: effectX(x), y1: 0, y2: 22 })),
    interval ? s("line", { x1: effectX(row.ci_low), x2: effectX(row.ci_high), y1: 11, y2: 11, stroke: colour, "stroke-width": 2.5, "stroke-linecap": "round" }) : null,
    s("circle", { cx: effectX(row.effect), cy: 11, r: 5, fill: colour, class: "halo" })), label);
}

// --- along the depth --------------------------------------------------------------------------------------

function depthCurves(cells) {
  const metrics = REPORT.shown.depth.filter((metric) => metric in REPORT.metrics);
  const sizes = unique(cells.map((cell) => cell.d_head));
  const asShares = (metric) => REPORT.metrics[metric].counts_dimensions && sizes.length > 1 && sizes.every(isNumber);
  const lines = metrics.map((metric) => [metric, depthLines(cells, metric, asShares(metric))]);
  const absent = lines.filter(([, found]) => !found.length).map(([metric]) => metricTitle(metric));
  return [
    h("p", { class: "note" }, "Lines: the mean over the heads of a layer. Dots: single heads. Depth 0 is a model's first layer and 1 its last; these metrics depend on no task."),
    h("div", { class: "controls" }, h("label", { class: "chip" }, h("input", { type: "checkbox", checked: chosen.dots, onchange: (event) => {
      chosen.dots = event.target.checked;
      document.querySelectorAll(".depth-dots").forEach((node) => node.setAttribute("visibility", chosen.dots ? "visible" : "hidden"));
    } }), "single heads")),
    h("div", { class: "grid3" }, lines.filter(([, found]) => found.length).map(([metric, found]) => depthPlot(asShares(metric) ? { ...REPORT.metrics[metric], title: `${metricTitle(metric)} / d_head`, high: 1 } : REPORT.metrics[metric], found, metric)),
      summedPlots(cells)),
    absent.length ? h("p", { class: "note" }, `Unavailable in all chosen cells: ${absent.join(", ")}.`) : null,
    ...unavailableNotes(cells, metrics),
  ];
}

function unavailableNotes(cells, metrics) {
  const seen = new Map();
  for (const cell of cells) for (const metric of metrics) {
    const reason = cell.unavailable[metric];
    if (reason && !siblings(cell).some((other) => column(other, metric))) {
      const key = `${cell.weights_label}, unavailable: ${reason}`;
      seen.set(key, new Set([...(seen.get(key) || []), metricTitle(metric)]));
    }
  }
  return [...seen].map(([key, titles]) => h("p", { class: "note" }, `${key} (${[...titles].join(", ")}).`));
}

/** One line for each model and processing: from the first of its cells that has the metric; as shares of d_head if asked. */
function depthLines(cells, metric, shares) {
  const found = new Map();
  for (const cell of cells) {
    const values = column(cell, metric);
    if (!values || found.has(`${cell.model} ${cell.weights}`)) continue;
    const last = Math.max(1, cell.layers - 1);
    const points = [];
    for (let layer = 0; layer < cell.layers; layer += 1) {
      const heads = values.slice(layer * cell.heads, (layer + 1) * cell.heads).filter(isNumber).map((x) => (shares ? x / cell.d_head : x));
      if (heads.length) points.push({ layer, depth: layer / last, heads, mean: heads.reduce((a, b) => a + b, 0) / heads.length });
    }
    found.set(`${cell.model} ${cell.weights}`, { cell, points });
  }
  return [...found.values()];
}

const SUMMED = {
  qk_symmetry: { title: "Symmetry, summed W_QK", low: -1, high: 1 },
  qk_directionality: { title: "Directionality, summed W_QK", low: -1, high: 1 },
};

/** Metrics of the sum over a layer's heads, on raw weights, as in Saponati et al. 2025. */
function summedPlots(cells) {
  return Object.entries(SUMMED).map(([name, facts]) => {
    const found = new Map();
    for (const cell of cells.filter((one) => one.by_layer && !found.has(`${one.model} ${one.weights}`))) {
      const last = Math.max(1, cell.layers - 1);
      const points = rows(cell, "by_layer").filter((row) => isNumber(row[name])).map((row) => ({ layer: row.layer, depth: row.layer / last, heads: [], mean: row[name] }));
      if (points.length) found.set(`${cell.model} ${cell.weights}`, { cell, points });
    }
    return found.size ? depthPlot(facts, [...found.values()], `summed-${name}`, "Raw weights; Saponati et al. 2025.") : null;
  });
}

function depthPlot(facts, lines, name, caption) {
  const values = lines.flatMap((line) => line.points.flatMap((point) => [...point.heads, point.mean]));
  const reach = Math.max(...values.map(Math.abs));
  const signed = facts.low === -1 ? [1, 0.5, 0.2, 0.1].filter((most) => reach <= most).pop() ?? 1 : null;
  const low = signed ? -signed : Math.min(0, ...values);
  const high = signed || (facts.high !== null ? facts.high : reach * 1.04);
  const size = { width: 340, height: 230, left: 44, right: 112, bottom: 38 };
  const plot = axes({ ...size, x: { domain: [0, 1], ticks: [0, 0.5, 1], title: "relative depth" }, y: { domain: [low, high] } });
  const labelled = lines.length <= MANY;
  const ends = spread(lines.map((line) => plot.atY(line.points[line.points.length - 1].mean)), 14, plot.top + 4, plot.bottom);
  const drawn = lines.map((line, k) => {
    const style = lineLook(line.cell);
    const points = line.points.map((point) => [plot.atX(point.depth), plot.atY(point.mean)]);
    const last = points[points.length - 1];
    return [
      s("g", { class: "depth-dots", visibility: chosen.dots ? "visible" : "hidden" }, 
        specks(line.points.flatMap((point) => point.heads.map((x) => [plot.atX(point.depth), plot.atY(x)])), 1.8, style.stroke, 0.28)),
      s("path", { d: path(points), fill: "none", stroke: style.stroke, "stroke-width": 2.2, "stroke-dasharray": style.dash || null, "stroke-linejoin": "round" }),
      line.points.map((point) => tip(s("circle", { cx: plot.atX(point.depth), cy: plot.atY(point.mean), r: 3.2, fill: style.stroke }),
        `${line.cell.weights_label}, layer ${point.layer}\n${point.heads.length ? `mean ${number(point.mean)} of ${plural(point.heads.length, "head")}` : number(point.mean)}`)),
      labelled && Math.abs(ends[k] - last[1]) > 5 ? s("path", { d: path([[last[0] + 4, last[1]], [plot.right + 8, ends[k]]]), stroke: style.stroke, "stroke-width": 0.8, fill: "none" }) : null,
      !labelled ? null : s("text", { x: plot.right + 10, y: ends[k] + 4, class: "halo", style: `fill:${style.stroke};font-size:11.5px` }, lineName(line.cell)),
    ];
  });
  const zero = facts.low === -1 ? s("line", { class: "axis", x1: plot.left, x2: plot.right, y1: plot.atY(0), y2: plot.atY(0) }) : null;
  const said = lines.map((line) => `${line.cell.weights_label} from ${number(line.points[0].mean)} to ${number(line.points[line.points.length - 1].mean)}`);
  return figure({
    title: facts.title,
    drawing: svg(size.width, size.height, `${facts.title} by relative depth: ${said.join("; ")}`, plot.group, zero, drawn),
    name: `depth-${name}`,
    caption,
    table: () => [["model", "layer", "relative depth", "mean"], lines.flatMap((line) => line.points.map((point) => [line.cell.weights_label, String(point.layer), point.depth, point.mean]))],
  });
}

/** A model's name at the end of its line; of several weights of a model, what tells them apart is never cut. */
function lineName(cell) {
  const more = cell.weights_label.slice(cell.model.length);
  return `${clipped(cell.model, Math.max(6, 14 - more.length))}${more}`;
}

/** The colour of the model; dashes of their own for its other weights. */
function lineLook(cell) {
  const place = unique(CELLS.filter((other) => other.model === cell.model).map((other) => other.weights)).indexOf(cell.weights);
  const style = look(cell.model);
  return place ? { ...style, dash: ["6 4", "2 3", "9 3 2 3"][(place - 1) % 3] } : style;
}

function clipped(text, most) {
  const letters = [...text];
  return letters.length > most ? `${letters.slice(0, most - 1).join("")}…` : text;
}
