// Head atlas: every head of every model as a square, coloured by one metric.

const atlasChoice = { task: null, metric: null };

function atlasPage(task, metric) {
  const tasks = TASKS;
  const best = tasks.find((name) => CELLS.some((cell) => cell.task === name && claimed(cell).size)) || tasks[0];
  atlasChoice.task = tasks.includes(task) ? task : tasks.includes(atlasChoice.task) ? atlasChoice.task : best;
  const cells = atlasCells(atlasChoice.task);
  const metrics = Object.keys(REPORT.metrics).filter((name) => REPORT.scales[atlasChoice.task][name]);
  const wanted = [metric, atlasChoice.metric, RATIOS.ov.vocab, RATIOS.ov.residual, metrics[0]];
  atlasChoice.metric = wanted.find((name) => metrics.includes(name));
  const go = (next) => { location.hash = `#atlas/${encodeURIComponent(next.task)}/${next.metric}`; };
  return [
    h("h1", { tabindex: -1 }, "Head atlas"),
    h("p", { class: "lead" }, `Every attention head, layer by layer. ${cells.some((cell) => claimed(cell).size) ? "Rings mark the heads that are claimed for the task; a" : "A"} square opens its head.`),
    h("div", { class: "controls" },
      select("Task", tasks.map((name) => [name, name]), atlasChoice.task, (name) => go({ ...atlasChoice, task: name })),
      select("Colour by", metricGroups(metrics), atlasChoice.metric, (name) => go({ ...atlasChoice, metric: name }))),
    atlasMetric(atlasChoice.task, atlasChoice.metric),
    h("div", { class: "flow" }, cells.map((cell) => atlas(cell, atlasChoice.metric))),
    atlasLegend(cells),
    h("p", { class: "note" }, "Keyboard: Tab reaches a grid, the arrow keys move in it, Enter opens the head."),
  ];
}

/** One cell of each model and its weights: of several analyses the first, which has the most. */
function atlasCells(task) {
  const found = new Map();
  for (const cell of CELLS.filter((one) => one.task === task)) {
    const key = `${cell.model} ${cell.weights} ${cell.seed}`;
    if (!found.has(key)) found.set(key, cell);
  }
  return [...found.values()];
}

/** Metrics in groups: of the task, of each circuit, of positions. */
function metricGroups(metrics) {
  const group = (name) => {
    const metric = REPORT.metrics[name];
    if (metric.of_task) return `${metric.circuit.toUpperCase()}, on the task's words`;
    if (metric.topic === "position") return "position or content";
    return metric.circuit === "ov" ? "OV: what is copied" : "QK: where it looks";
  };
  const groups = new Map();
  for (const name of metrics) groups.set(group(name), [...(groups.get(group(name)) || []), [name, REPORT.metrics[name].title]]);
  return [...groups].map(([label, options]) => ({ label, options }));
}

function atlasMetric(task, name) {
  const metric = REPORT.metrics[name];
  const scale = REPORT.scales[task][name];
  const range = `${metric.low === null ? "…" : tickText(metric.low)} to ${metric.high === null ? "…" : tickText(metric.high)}`;
  return h("div", { class: "flow", style: "gap:6px 40px;align-items:center" },
    colourBar(scale, metric.title),
    h("p", { class: "note", style: "margin:0" }, h("code", {}, name), ` = ${metric.formula}. Range ${range}`,
      metric.chance === null ? "" : `, ${tickText(metric.chance)} by chance`, metric.source ? `. ${metric.source}` : "", "."));
}

function atlas(cell, metric) {
  const title = cell.label;
  if (!column(cell, metric)) {
    return h("figure", {}, h("h3", {}, title), missing(whyMissing(cell, metric)));
  }
  const size = Math.max(15, Math.min(36, Math.floor(560 / Math.max(cell.heads, 6))));
  const [left, top] = [46, 24];
  const scale = REPORT.scales[cell.task][metric];
  const [width, height] = [left + size * cell.heads + 4, top + size * cell.layers + 22];
  const grid = s("svg", { class: "plot atlas", viewBox: `0 0 ${width} ${height}`, width, height, role: "grid", style: leastWidth(width), "data-cell": cell.name,
    "aria-label": `${title}: ${REPORT.metrics[metric].title} of ${cell.layers} layers of ${cell.heads} heads`, "aria-rowcount": cell.layers, "aria-colcount": cell.heads });
  const step = Math.max(1, Math.ceil(22 / size));
  grid.append(s("g", { "aria-hidden": "true" },
    Array.from({ length: cell.heads }, (_, k) => (k % step ? null : s("text", { class: "tick", x: left + size * (k + 0.5), y: top - 7, "text-anchor": "middle" }, k))),
    Array.from({ length: cell.layers }, (_, k) => ((k % Math.max(1, Math.ceil(14 / size))) ? null : s("text", { class: "tick", x: left - 8, y: top + size * (k + 0.5) + 4, "text-anchor": "end" }, k))),
    s("text", { class: "tick", x: left + (size * cell.heads) / 2, y: height - 5, "text-anchor": "middle" }, "head"),
    s("text", { class: "tick", transform: `translate(12 ${top + (size * cell.layers) / 2}) rotate(-90)`, "text-anchor": "middle" }, "layer")));
  const [marks, tried] = [claimed(cell), candidates(cell)];
  const first = [...marks.keys()][0] || "0.0";
  for (let layer = 0; layer < cell.layers; layer += 1) {
    const row = s("g", { role: "row" });
    for (let head = 0; head < cell.heads; head += 1) {
      row.append(atlasHead(cell, metric, scale, layer, head, marks, tried, { x: left + head * size, y: top + layer * size, size, focus: first }));
    }
    grid.append(row);
  }
  grid.addEventListener("keydown", (event) => moveInGrid(event, grid, cell));
  return figure({
    title,
    drawing: grid,
    name: `atlas-${cell.model}-${cell.task}-${metric}`,
    table: () => [["layer.head", metric, "claimed as", "verdict"], everyHead(cell).map(([layer, head]) => {
      const found = marks.get(`${layer}.${head}`) || [];
      return [`${layer}.${head}`, value(cell, metric, layer, head), found.map((row) => roleName(row.role)).join(", "), found.map(verdictText).join(", ")];
    }).sort((a, b) => (b[1] ?? -Infinity) - (a[1] ?? -Infinity))],
  });
}

function everyHead(cell) {
  return Array.from({ length: cell.layers * cell.heads }, (_, place) => [Math.floor(place / cell.heads), place % cell.heads]);
}

function atlasHead(cell, metric, scale, layer, head, marks, tried, { x, y, size, focus }) {
  const label = `${layer}.${head}`;
  const found = value(cell, metric, layer, head);
  const [claims, proposals] = [marks.get(label) || [], tried.get(label) || []];
  const background = colour(scale, found);
  const ink = inkOn(background);
  const role = claims.map((row) => roleShort(row.role)).join(" ");
  const said = isNumber(found) ? number(found) : `unavailable (${whyMissing(cell, metric, layer)})`;
  const roles = claims.map((row) => `${roleName(row.role)}: ${verdictText(row)}`);
  if (!claims.length) unique(proposals.map((row) => row.role)).forEach((name) => roles.push(`candidate for ${roleName(name)}`));
  const node = s("a", { href: headLink(cell, label), role: "gridcell", tabindex: label === focus ? 0 : -1, "data-head": label,
    "aria-label": [`head ${label}`, `${REPORT.metrics[metric].title} ${said}`, ...roles].join(", ") },
    s("rect", { class: "focus", x: x + 1, y: y + 1, width: size - 2, height: size - 2, rx: Math.min(4, size / 7), fill: background }),
    isNumber(found) ? null : s("path", { d: `M${x + 4} ${y + size - 4} L${x + size - 4} ${y + 4}`, stroke: shade(REPORT.palette.crossed), "stroke-width": 1 }),
    claims.length || proposals.length ? s("rect", { x: x + 3.2, y: y + 3.2, width: size - 6.4, height: size - 6.4, rx: Math.min(3, size / 9), fill: "none",
      stroke: ink, "stroke-width": claims.length ? 2 : 1.2, "stroke-dasharray": claims.length ? null : "2 2" }) : null,
    role && size >= 26 ? s("text", { x: x + size / 2, y: y + size / 2 + 3.6, "text-anchor": "middle", style: `fill:${ink};font-size:${role.length > 4 ? 8 : 10}px;font-weight:600` }, clipped(role, 6)) : null);
  return tip(node, [`${label}   ${REPORT.metrics[metric].title}: ${said}`, ...roles].join("\n"));
}

function moveInGrid(event, grid, cell) {
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -Infinity], End: [0, Infinity] };
  const here = event.target.closest("[data-head]");
  if (!here || !steps[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  const [layer, head] = here.getAttribute("data-head").split(".").map(Number);
  const inside = (x, n) => Math.min(n - 1, Math.max(0, x));
  const next = `${inside(layer + steps[event.key][0], cell.layers)}.${inside(head + steps[event.key][1], cell.heads)}`;
  const node = grid.querySelector(`[data-head="${next}"]`);
  here.setAttribute("tabindex", -1);
  node.setAttribute("tabindex", 0);
  node.focus();
}

function atlasLegend(cells) {
  const roles = unique(cells.flatMap((cell) => rows(cell, "verdicts").map((row) => row.role)));
  const proposed = cells.some((cell) => candidates(cell).size);
  const square = (dashed) => s("svg", { class: "glyph", viewBox: "0 0 14 14", "aria-hidden": "true" },
    s("rect", { x: 1.5, y: 1.5, width: 11, height: 11, rx: 2, fill: "none", stroke: "currentColor", "stroke-width": dashed ? 1.3 : 2, "stroke-dasharray": dashed ? "2 2" : null }));
  return h("div", { class: "legend" },
    roles.length ? h("span", { class: "verdict" }, square(false), "claimed") : null,
    proposed ? h("span", { class: "verdict" }, square(true), "candidate: among the strongest for a role, where nothing is claimed") : null,
    roles.map((role) => h("span", {}, h("b", {}, roleShort(role)), ` ${roleName(role)}`)));
}

