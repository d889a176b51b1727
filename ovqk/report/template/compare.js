// Compare: models beside each other, by verdict, by effect, and along their depth.

const chosen = { models: new Set(MODELS), tasks: new Set(TASKS), verdict: "", text: "", sort: ["task", 1], dots: true, name: "" };
const MANY = REPORT.depth.most; // models whose boxes one can still tell apart

function comparePage() {
  const content = h("div");
  const draw = () => content.replaceChildren(...compareContent().filter(Boolean));
  draw();
  return [
    h("h1", { tabindex: -1 }, REPORT.opening.title),
    h("p", { class: "lead" }, REPORT.opening.lead),
    compareControls(draw),
    content,
  ];
}

function compareControls(draw) {
  const chips = (title, items, set) => h("fieldset", {}, h("legend", {}, title), items.map((item) => h("label", { class: "chip" },
    h("input", { type: "checkbox", checked: set.has(item), onchange: (event) => { set[event.target.checked ? "add" : "delete"](item); draw(); } }), item)));
  const boxes = chips("Models", MODELS, chosen.models);
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
  return [h("h2", {}, REPORT.wording.by_frequency.title), h("p", { class: "note" }, REPORT.wording.by_frequency.says), legend(new Set(drawn.flatMap((cell) => cell.frequencies.verdicts))),
    ...drawn.map(({ frequencies }) => h("figure", {}, h("img", { class: "drawn", src: frequencies.address, alt: frequencies.description }), frequencies.pairs ? h("figcaption", {}, frequencies.pairs) : null))];
}

/** The message of each cell without results of a task that no other cell has: no table has a place for it. */
function lostElsewhere() {
  return REPORT.failures.filter((one) => !TASKS.includes(one.task) && named(one.model)).map((one) =>
    h("p", { class: "small lost" }, `${one.model} / ${one.task} / ${one.analysis} without results: ${one.error}`));
}

// --- candidates -------------------------------------------------------------------------------------------

const FIRST = REPORT.limits.candidates; // of each role

/** For each task a table of models x roles: the strongest heads of models for which nothing is claimed. */
function candidateTables(cells) {
  const with_some = cells.filter((cell) => candidates(cell).size);
  const tasks = TASKS.filter((task) => with_some.some((cell) => cell.task === task));
  return tasks.flatMap((task, k) => {
    const [table, legend] = candidatesOf(task, with_some.filter((cell) => cell.task === task));
    const worth = k ? null : h("p", { class: "small muted worth" }, REPORT.wording.candidates_worth);
    return [h("h2", {}, `Candidates: ${task}`), worth, h("div", { class: with_some.length > MANY ? "scroll low" : "scroll" }, table), legend];
  });
}

/** A task's table, and what its metrics mean: below the table, where it stays if the table is scrolled. */
function candidatesOf(task, cells) {
  const ranked = (cell) => rows(cell, "candidates").filter((row) => ranks(row) && row.rank <= FIRST);
  const of_role = (cell, role) => ranked(cell).filter((row) => row.role === role);
  const joined = new Map(); // roles with the same candidates by the same metric share a column
  for (const role of unique(cells.flatMap((cell) => ranked(cell).map((row) => row.role)))) {
    const key = JSON.stringify(cells.map((cell) => of_role(cell, role).map((row) => [headLabel(row), row.metric, row.prediction])));
    joined.set(key, [...(joined.get(key) || []), role]);
  }
  const columns = [...joined.values()].map((roles) => [roles[0], roles.map(roleName).join(", ")]);
  const lost = REPORT.failures.filter((one) => one.task === task && chosen.tasks.has(task) && named(one.model));
  const metrics = unique(cells.flatMap(ranked).flatMap((row) => [row.metric, ...(row.beside || "").split(" ")])).filter((name) => name in REPORT.wording.ranked_by);
  const by = (role) => rankedBy(cells.flatMap(ranked).find((row) => row.role === role));
  const legend = h("p", { class: "small muted meaning" }, metrics.map((name) => `${name}: ${REPORT.wording.ranked_by[name]}.`).join(" "));
  const table = h("table", { class: "matrix wide candidates" },
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "model"), columns.map(([role, name]) => h("th", { scope: "col" }, name, h("div", { class: "muted small" }, by(role)))))),
    h("tbody", {},
      cells.map((cell) => h("tr", {}, h("th", { scope: "row", class: cell.label.length < 22 ? "whole" : null }, cell.label), columns.map(([role, name]) => h("td", { "data-label": `${name}: ${by(role)}` },
        of_role(cell, role).length ? of_role(cell, role).map((row) => candidateMark(cell, row)) : h("span", { class: "muted small" }, "none"))))),
      lost.map((one) => h("tr", {}, h("th", { scope: "row" }, one.model), h("td", { colspan: Math.max(1, columns.length), class: "small" }, `without results: ${one.error}`)))));
  return [table, legend];
}

/** What a role's candidates are ranked by, with an arrow to the strong end. */
function rankedBy(row) {
  const by = `${row.metric} ${REPORT.wording.arrows[row.prediction]}`;
  return row.beside ? `${by} and ${row.beside} (worse place)` : by;
}

function candidateMark(cell, row) {
  const label = headLabel(row);
  return [tip(h("a", { class: "mark", href: headLink(cell, label), "aria-label": `head ${label}, candidate for ${roleName(row.role)}` }, label, h("span", { class: "muted small" }, ` ${number(row.value)}`)),
    `${label}: candidate for ${roleName(row.role)}\n${row.metric} ${REPORT.wording.arrows[row.prediction]} ${number(row.value)}${row.gap === 0 ? ", as the next head" : ""}`), " "];
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
    h("p", { class: "note" }, "Each claimed head stands under its role. The mark before a role is the verdict on its heads together; the mark before a head is the verdict on that head alone. Bars count, by verdict, the heads that could be corroborated; how many could not alone, whatever their weights, stands beside. A verdict is about the weights: it does not say that the model does so on task inputs."),
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
  const note = rest ? h("span", { class: "muted small" }, heads.length ? ` ${rest} more could not be corroborated alone` : `none of ${plural(rest, "head")} could be corroborated alone`) : null;
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

const EFFECT_COLUMNS = REPORT.wording.effect_columns;

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

/** The panels that Matplotlib drew, with the lines of the chosen models. */
function depthCurves(cells) {
  const lines = unique(cells.map((cell) => cell.line));
  const named = lines.length <= REPORT.depth.most;
  const panels = REPORT.depth.panels.filter((panel) => lines.some((line) => panel.lines[line]));
  const dots = panels.some((panel) => panel.svg.includes('"dots-'));
  return [
    h("p", { class: "note" }, `Lines: the mean over the heads of a layer.${dots ? " Dots: single heads." : ""} Depth 0 is a model's first layer and 1 its last; these metrics depend on no task.${named ? "" : ` Point at a line for its name: of at most ${REPORT.depth.most} models all are named.`}`),
    named ? h("div", { class: "legend lines" }, lines.map((line) => h("span", { class: "verdict" }, swatch(REPORT.depth.lines[line]), REPORT.depth.lines[line].label))) : null,
    dots ? h("div", { class: "controls" }, h("label", { class: "chip" }, h("input", { type: "checkbox", checked: chosen.dots, onchange: (event) => {
      chosen.dots = event.target.checked;
      document.querySelectorAll("[data-part^='dots-']").forEach((node) => node.classList.toggle("off", !chosen.dots));
    } }), "single heads")) : null,
    h("div", { class: "grid3" }, panels.map((panel) => depthPanel(panel, lines))),
    REPORT.depth.absent.length ? h("p", { class: "note" }, `Unavailable in all cells: ${REPORT.depth.absent.join(", ")}.`) : null,
    ...unavailableNotes(cells),
  ];
}

function unavailableNotes(cells) {
  const seen = new Map();
  for (const cell of cells) for (const metric of REPORT.shown.depth) {
    const reason = cell.unavailable[metric];
    if (reason && !siblings(cell).some((other) => column(other, metric))) {
      const key = `${REPORT.depth.lines[cell.line].label}, unavailable: ${reason}`;
      seen.set(key, new Set([...(seen.get(key) || []), metricTitle(metric)]));
    }
  }
  return [...seen].map(([key, titles]) => h("p", { class: "note" }, `${key} (${[...titles].join(", ")}).`));
}

/** The colour and dash of a line, as in its panels. */
function swatch(line) {
  return s("svg", { class: "swatch", viewBox: "0 0 24 8", "aria-hidden": "true" },
    s("path", { d: "M0 4H24", stroke: `var(--line-${line.colour})`, "stroke-width": 2.4, "stroke-dasharray": line.dash || null }));
}

function depthPanel(panel, lines) {
  const shown = lines.filter((line) => panel.lines[line]);
  const means = (line) => panel.lines[line].map((place) => REPORT.pool[place]);
  const label = (line) => REPORT.depth.lines[line].label;
  const said = shown.map((line) => `${label(line)} from ${number(means(line)[1][0])} to ${number(means(line)[1].at(-1))}`);
  const drawing = drawn(panel.svg, `${panel.title} by relative depth: ${said.join("; ")}`);
  for (const part of drawing.querySelectorAll("[data-part]")) {
    const [kind, line] = part.dataset.part.split("-");
    part.classList.toggle("off", !shown.includes(Number(line)) || (kind === "dots" && !chosen.dots));
    if (kind === "line") tip(part, label(line));
  }
  return figure({
    title: panel.title,
    drawing,
    name: `depth-${panel.name}`,
    caption: panel.caption,
    table: () => [["model", "relative depth", "mean"], shown.flatMap((line) => means(line)[0].map((depth, k) => [label(line), depth, means(line)[1][k]]))],
  });
}

function clipped(text, most) {
  const letters = [...text];
  return letters.length > most ? `${letters.slice(0, most - 1).join("")}…` : text;
}
