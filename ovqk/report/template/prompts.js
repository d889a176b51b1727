// On prompts: what heads do when the model runs on the task's prompts, beside what their weights say.

const RAN = CELLS.filter((cell) => cell.on_prompts);
const PROMPTS = "On prompts";

function promptVerdict(name) {
  return h("span", { class: "verdict" }, glyph(REPORT.palette.on_prompts[name]), REPORT.wording.on_prompts[name] || name);
}

function capital(text) {
  return text[0].toUpperCase() + text.slice(1);
}

/** What kind of number a quantity on prompts is: a share of something, or a number. */
function promptNumber(name, x) {
  if (!isNumber(x)) return "";
  return REPORT.wording.prompt_shares.includes(name) ? percent(x) : minus(fixed(x, 2));
}

// --- the comparison ---------------------------------------------------------------------------------------

/** Of one cell its four fields; of several, a line for each. */
function promptsOverview(cells) {
  const own = cells.filter((cell) => cell.on_prompts);
  if (!own.length) return [];
  const heading = h("h2", {}, PROMPTS);
  if (own.length === 1) {
    return [heading, ...own[0].on_prompts.lines.map((line) => h("p", {}, line)), own[0].on_prompts.readings.length ? quad(own[0]) : null, h("p", { class: "more" }, h("a", { href: `#prompts/${own[0].name}` }, "What each head does"))];
  }
  const shown = ["linked", "unlinked", "could", "unranked", "indirect", "neither"].filter((name) => !["unlinked", "unranked"].includes(name) || own.some((cell) => headsOf(cell, name).size));
  const titles = [["model", ""], ["task", ""], ["accuracy", "number"], ["logit difference", "number"], ["measured", "number"],
    ...shown.map((name) => [REPORT.wording.readings[name], ""]), [REPORT.wording.readings.undecided, "number"]];
  const count = (roles) => [...roles.values()].reduce((sum, heads) => sum + heads.length, 0);
  const line = (cell) => {
    const { testing, untestable } = cell.on_prompts;
    const measured = unique(rows(cell, "prompt_heads").filter((row) => row.measured).map(headLabel)).length;
    return h("tr", {},
      h("td", { class: "whole" }, h("a", { href: `#prompts/${cell.name}` }, cell.label)), h("td", { class: "whole" }, cell.task),
      testing ? [h("td", { class: "number" }, percent(testing.accuracy)), h("td", { class: "number" }, number(testing.logit_difference)), h("td", { class: "number" }, measured)] : h("td", { colspan: 3, class: "missing small" }, untestable),
      shown.map((name) => h("td", { class: "small" }, roleHeads(cell, headsOf(cell, name)))),
      h("td", { class: "number" }, count(headsOf(cell, "undecided"))));
  };
  return [heading,
    h("p", { class: "note" }, "Heads that are claimed or were chosen on one half of the prompts, by what they do on the other half and what their weights say. Accuracy and the mean logit difference are of that other half. Measured: heads that were chosen and confirmed."),
    h("div", { class: "scroll" }, h("table", { class: "wide readings", id: "readings" },
      h("thead", {}, h("tr", {}, titles.map(([title, kind]) => h("th", { scope: "col", class: kind || null }, title)))), h("tbody", {}, own.map(line))))];
}

/** Role -> heads of a cell that read so. */
function headsOf(cell, reading) {
  const found = new Map();
  for (const group of cell.on_prompts.readings.filter((one) => one.reading === reading)) {
    for (const [role, heads] of Object.entries(group.roles)) found.set(role, [...(found.get(role) || []), ...heads]);
  }
  return found;
}

function roleHeads(cell, roles) {
  return [...roles].map(([role, heads]) => h("div", { class: "role-heads" }, h("span", { class: "muted" }, `${roleName(role)} `),
    heads.map((head, k) => [k ? ", " : "", h("a", { href: headLink(cell, head) }, head)])));
}

// --- the page of a cell -----------------------------------------------------------------------------------

function promptsPage(name) {
  const cell = RAN.includes(BY_NAME.get(name)) ? BY_NAME.get(name) : RAN[0];
  const found = cell.on_prompts;
  return [
    h("h1", { tabindex: -1 }, `${PROMPTS}: ${cell.label} on ${cell.task}`),
    ...promptLines(cell),
    h("div", { class: "controls" }, select("Cell", RAN.map((one) => [one.name, cellTitle(one)]), cell.name, (next) => { location.hash = `#prompts/${next}`; })),
    ...(found.readings.length ? [h("h2", {}, "Weights and prompts together"), quad(cell), ...undecided(cell)] : [h("p", { class: "notice" }, found.rankings.length ? "No head is claimed, and none was chosen on prompts." : "No head was measured.")]),
    ...(found.rankings.length ? [h("h2", {}, "All heads: weights against prompts"),
      h("p", { class: "note" }, "Across: the role's weight metric. Upwards: what heads do on prompts. AUC: the chance that a measured head has more of the metric, in the predicted direction, than another head; 0.5 is chance. Spearman: of the two axes; split-half: of the upward one between the halves of the prompts, whose square root is about what a ranking without errors would reach."),
      foundLegend(new Set(found.rankings.flatMap((ranking) => REPORT.pool[ranking.found]))),
      h("div", { class: "grid3 rankings" }, found.rankings.map((ranking) => rankingPlot(cell, ranking)))] : []),
    ...promptTable(cell),
  ];
}

function promptLines(cell) {
  return cell.on_prompts.lines.map((line, k) => h("p", { class: k ? "note" : "lead" }, line));
}

/** The two verdicts crossed, with the names of the heads in the fields. */
function quad(cell) {
  const { verdicts, on_prompts: done, readings } = REPORT.wording;
  const field = (names) => h("td", { "data-reading": names[0] }, names.map((name, k) => {
    const roles = headsOf(cell, name);
    if (k && !roles.size) return null;
    return [h("div", { class: "reading" }, capital(readings[name])), roles.size ? roleHeads(cell, roles) : h("span", { class: "muted small" }, "no head")];
  }));
  return h("div", { class: "scroll" }, h("table", { class: "quad", id: "quad" },
    h("thead", {}, h("tr", {}, h("td", {}), h("th", { scope: "col" }, `on prompts: ${done.realised}`), h("th", { scope: "col" }, `on prompts: ${done.not_realised}, or ${done.opposite}`))),
    h("tbody", {},
      h("tr", {}, h("th", { scope: "row" }, `weights: ${verdicts.corroborated}`), field(["linked", "unlinked"]), field(["could"])),
      h("tr", {}, h("th", { scope: "row" }, `weights: ${verdicts.unsupported}, or ${verdicts.contradicted}`), field(["indirect", "unranked"]), field(["neither"])))));
}

/** The heads outside of the four fields, by the two verdicts that keep them out. */
function undecided(cell) {
  const groups = cell.on_prompts.readings.filter((group) => group.reading === "undecided");
  if (!groups.length) return [];
  return [h("h3", { class: "undecided" }, capital(REPORT.wording.readings.undecided)),
    h("p", { class: "note" }, "One of the two verdicts decides nothing: it is partial, depends on what replaces the head, or there is none."),
    h("div", { class: "scroll" }, h("table", { id: "undecided" }, h("thead", {}, h("tr", {}, ["weights", "on prompts", "heads"].map((title) => h("th", { scope: "col" }, title)))),
      h("tbody", {}, groups.map((group) => h("tr", {},
        h("td", {}, group.weights ? verdict({ verdict: group.weights }) : h("span", { class: "muted" }, "not tested: not claimed")),
        h("td", {}, promptVerdict(group.prompts)),
        h("td", { class: "small" }, roleHeads(cell, new Map(Object.entries(group.roles)))))))))];
}

// --- weights against prompts ------------------------------------------------------------------------------

/** The mark of a head in a scatter: its shape says what its colour says. */
function foundMark(found, x, y, attributes = {}) {
  const fill = shade(REPORT.palette.found[found]);
  if (found === "neither") return s("circle", { class: "focus", cx: x, cy: y, r: 3.2, fill, "fill-opacity": 0.5, ...attributes });
  const look = { class: "focus", fill: found === "claimed" ? css("--ground") : fill, stroke: fill, "stroke-width": 2, ...attributes };
  if (REPORT.palette.found_markers[found] === "D") return s("path", { d: `M${x - 5.6} ${y} L${x} ${y - 5.6} L${x + 5.6} ${y} L${x} ${y + 5.6} Z`, ...look });
  return s("circle", { cx: x, cy: y, r: 4.8, ...look });
}

function foundLegend(there) {
  return h("div", { class: "legend" }, Object.entries(REPORT.wording.found).filter(([name]) => there.has(name)).map(([name, text]) =>
    h("span", { class: "verdict" }, s("svg", { class: "glyph", viewBox: "0 0 14 14", "aria-hidden": "true" }, foundMark(name, 7, 7)), text)));
}

function rankingPlot(cell, ranking) {
  const columns = ["layer", "head", "x", "y", "found"].map((name) => REPORT.pool[ranking[name]]);
  const points = columns[0].map((_, k) => Object.fromEntries(["layer", "head", "x", "y", "found"].map((name, at) => [name, columns[at][k]])))
    .filter((point) => isNumber(point.x) && isNumber(point.y));
  const title = capital(roleName(ranking.role));
  const stats = h("p", { class: "small muted stats" }, ranking.says.map((line, k) => [k ? h("br") : null, line]));
  if (!points.length) return h("figure", {}, h("h3", {}, title), missing("no head has both numbers"));
  const [across, upwards] = cell.on_prompts.plot;
  const size = { width: 48 + across + 14, height: 12 + upwards + 42, left: 48, right: 14, top: 12, bottom: 42 };
  const plot = axes({ ...size, x: { domain: ranking.limits[0], title: ranking.titles[0] }, y: { domain: ranking.limits[1] } });
  const spots = points.map((point) => ({ ...point, label: headLabel(point), at: [plot.atX(point.x), plot.atY(point.y)] }));
  const order = Object.keys(REPORT.wording.found).reverse();
  const drawn = [...spots].sort((a, b) => order.indexOf(a.found) - order.indexOf(b.found));
  const named = spots.filter((spot) => ranking.names[spot.label]);
  const zero = plot.atY(0);
  const figureNode = figure({
    title,
    drawing: [stats, svg(size.width, size.height, `${title}: ${ranking.titles.join(" ")} against ${ranking.quantity}, ${points.length} heads; ${ranking.says.join(", ")}`,
      plot.group,
      zero > plot.top && zero < plot.bottom ? s("line", { class: "axis", x1: plot.left, x2: plot.right, y1: zero, y2: zero }) : null,
      drawn.map((spot) => s("a", { href: headLink(cell, spot.label), tabindex: spot.found === "neither" ? -1 : 0, "aria-label": `head ${spot.label}: ${REPORT.wording.found[spot.found]}` },
        tip(foundMark(spot.found, ...spot.at), `${spot.label}, ${REPORT.wording.found[spot.found]}\n${ranking.titles[0]}: ${number(spot.x, 3)}\n${ranking.quantity}: ${number(spot.y, 3)}`))),
      named.map((spot) => nameBeside(spot, ranking.names[spot.label])))],
    caption: `Upwards: ${ranking.quantity}.${ranking.titles[1] ? ` ${ranking.titles[1]}` : ""}`,
    name: `prompts-${cell.model}-${cell.task}-${ranking.role}`,
    table: () => [["layer.head", ranking.titles[0], ranking.quantity, "found"], points.map((point) => [headLabel(point), point.x, point.y, REPORT.wording.found[point.found]])],
  });
  return figureNode;
}

/** The name of a marked head at the place that Python chose, with a line to its mark if it stands far off. */
function nameBeside(spot, [across, up, far]) {
  const [x, y] = [spot.at[0] + across, spot.at[1] - up];
  const half = Math.sign(across) * 3.5 * spot.label.length;
  return [far ? s("line", { stroke: css("--muted"), "stroke-width": 0.8, x1: spot.at[0], y1: spot.at[1], x2: x - half, y2: y }) : null,
    s("text", { class: "strong halo", x, y: y + 4, "text-anchor": "middle", style: "font-size:11.5px" }, spot.label)];
}

// --- the table of heads -----------------------------------------------------------------------------------

function promptTable(cell) {
  const found = rows(cell, "prompt_heads");
  if (!found.length) return [];
  const quantities = Object.entries(REPORT.wording.prompt_columns);
  const titles = [["head", ""], ["claimed or measured", ""], ...quantities.map(([, title]) => [title, "number"]), ["weights", ""], ["on prompts", ""], ["together", ""]];
  return [h("h2", {}, "Claimed and measured heads"),
    h("p", { class: "note" }, REPORT.wording.prompt_legend),
    h("div", { class: "scroll", tabindex: 0 }, h("table", { class: "wide", id: "prompt-heads" },
      h("thead", {}, h("tr", {}, titles.map(([title, kind]) => h("th", { scope: "col", class: kind || null }, title)))),
      unique(found.map((row) => row.role)).map((role) => h("tbody", {},
        h("tr", {}, h("th", { scope: "rowgroup", colspan: titles.length, class: "group" }, capital(roleName(role)))),
        found.filter((row) => row.role === role).map((row) => h("tr", {},
          h("td", {}, h("a", { href: headLink(cell, headLabel(row)) }, headLabel(row))),
          h("td", { class: "small whole" }, row.found),
          quantities.map(([name]) => h("td", { class: "number" }, promptNumber(name, row[name]))),
          h("td", { class: "small whole" }, row.weights ? verdict({ verdict: row.weights }) : h("span", { class: "muted" }, "not tested")),
          h("td", { class: "small on-prompts" }, promptVerdict(row.activations), row.reason ? h("div", { class: "muted" }, row.reason) : null),
          h("td", { class: "small together" }, row.reading === "undecided" ? h("span", { class: "muted" }, REPORT.wording.readings.undecided) : REPORT.wording.readings[row.reading])))))))];
}

// --- the page of a head -----------------------------------------------------------------------------------

/** What a head does on prompts, for its roles and, folded, for the others. */
function headOnPrompts(cell, layer, head) {
  if (!cell.on_prompts) return [];
  const values = rows(cell, "prompt_values").filter((row) => isHead(row, layer, head));
  const heading = h("h2", {}, PROMPTS);
  if (!values.length) return [heading, missing(cell.on_prompts.untestable || "not on this page: see activations.parquet")];
  const judged = new Map(rows(cell, "prompt_heads").filter((row) => isHead(row, layer, head)).map((row) => [row.role, row]));
  const own = values.filter((row) => judged.has(row.role));
  const others = values.filter((row) => !judged.has(row.role));
  const part = (row) => promptCard(cell, row, judged.get(row.role));
  const folded = h("details", {}, h("summary", {}, own.length ? `for ${plural(others.length, "other role")}` : `neither claimed nor chosen for a role: what it does for each of ${others.length}`));
  folded.addEventListener("toggle", () => { if (folded.open && folded.children.length === 1) folded.append(...others.map(part)); });
  return [heading,
    h("p", { class: "note" }, "Means over clusters of prompts of the testing half. Whiskers: a standard error to both sides. A star marks the quantities that decide. Replaced: by what the head puts out on the prompt's own counterfactual, or there on average; restored: put into the counterfactual run. ", h("a", { href: `#prompts/${cell.name}` }, "All heads"), "."),
    ...own.map(part), others.length ? folded : null];
}

function promptCard(cell, row, judged) {
  const pictures = cell.on_prompts.pictures[row.role] || [];
  const link = isNumber(row.write_link) ? `R² ${number(row.write_link)}, slope ${number(row.write_link_slope)}` : null;
  const scores = judged ? scoreParts(judged) : "";
  return h("section", { class: "card" },
    h("h3", {}, capital(roleName(row.role)), judged ? promptVerdict(judged.activations) : null, judged ? h("span", { class: "small muted" }, judged.found) : null),
    judged ? facts([
      ["Why", judged.reason],
      ["Weights", judged.weights ? verdict({ verdict: judged.weights }) : null],
      ["Together", REPORT.wording.readings[judged.reading]],
    ]) : null,
    h("div", { class: "grid3 pictures" }, pictures.map((picture) => promptBars(cell, row, picture)).filter(Boolean)),
    link || scores ? facts([
      ["Write", link ? `${link}: of the write on attention times the weights' own account of it` : null],
      ["Score", scores || null],
    ]) : null);
}

/** Where a head's contrast in score between its source and other tokens comes from, in words. */
function scoreParts(row) {
  if (!isNumber(row.score_link)) return "";
  const part = (name, text) => (isNumber(row[name]) ? [`${percent(row[name])} ${text}`] : []);
  return `${number(row.score_contrast)} above other tokens': ${[
    ...part("score_link", "from the two tokens themselves"),
    ...part("score_key_partner", "through what its partners write to the key"),
    ...part("score_query_partner", "through what its partners write to the query"),
  ].join(", ")}`;
}

const BARS = { width: 330, left: 158, right: 56, line: 25 };

/** Quantities of one kind as bars from zero, with the standard error of the first. */
function promptBars(cell, row, picture) {
  const bars = picture.bars.filter(([column]) => isNumber(row[column]));
  if (!bars.length) return null;
  const error = row[`${picture.kind}_se`];
  const share = picture.kind === "effect";
  const text = (x) => (share ? percent(x) : minus(fixed(x, 2)));
  const ends = bars.flatMap(([column]) => [row[column], ...(column === picture.kind && isNumber(error) ? [row[column] - error, row[column] + error] : [])]);
  const domain = picture.kind === "attention" ? [0, 1] : [Math.min(0, ...ends), Math.max(0, ...ends)];
  const atX = linear(domain, [BARS.left, BARS.width - BARS.right]);
  const height = 6 + bars.length * BARS.line;
  const ink = accent();
  const y = (k) => 6 + k * BARS.line;
  const title = `${capital(picture.title)}${picture.decides ? " *" : ""}`;
  return figure({
    title,
    drawing: svg(BARS.width, height, `${picture.title}: ${bars.map(([column, label]) => `${label} ${text(row[column])}`).join(", ")}`,
      picture.kind === "attention" ? [0, 1].map((x) => s("line", { class: "gridline", x1: atX(x), x2: atX(x), y1: 2, y2: height })) : null,
      bars.map(([column, label], k) => {
        const [a, b] = [atX(Math.min(0, row[column])), atX(Math.max(0, row[column]))];
        const first = column === picture.kind;
        const past = first && isNumber(error) ? atX(row[column] + error) : b;
        return [
          s("text", { class: first ? null : "soft", x: BARS.left - 9, y: y(k) + 13, "text-anchor": "end" }, label),
          s("rect", { x: a, y: y(k), width: Math.max(1, b - a), height: 17, fill: first ? ink : css("--muted"), "fill-opacity": first ? 1 : 0.55 }),
          first && isNumber(error) ? s("line", { x1: atX(Math.max(domain[0], row[column] - error)), x2: atX(Math.min(domain[1], row[column] + error)), y1: y(k) + 8.5, y2: y(k) + 8.5, stroke: css("--ink"), "stroke-width": 1.8 }) : null,
          s("text", { x: Math.max(b, past) + 7, y: y(k) + 13 }, text(row[column])),
        ];
      }),
      s("line", { class: "axis", x1: atX(0), x2: atX(0), y1: 0, y2: height })),
    name: `${picture.kind}-${cell.model}-${headLabel(row)}-${row.role}`,
    table: () => [["", "value", "standard error"], bars.map(([column, label]) => [label, row[column], column === picture.kind && isNumber(error) ? error : ""])],
  });
}
