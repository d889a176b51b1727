// Circuit: the claimed heads as a graph by role, joined where one reads what another writes.

const edgeChoice = { q: true, k: true, v: true, least: 0 };
const MOST_EDGES = 80;

function circuitPage(name) {
  const named = BY_NAME.get(name);
  const cell = named || CELLS.find((one) => rows(one, "composition").length && claimed(one).size) || CELLS.find((one) => claimed(one).size) || CELLS[0];
  const box = h("div");
  const draw = () => box.replaceChildren(...circuitContent(cell, draw).filter(Boolean));
  draw();
  return [
    h("h1", { tabindex: -1 }, `Circuit: ${cell.label} on ${cell.task}`),
    claimed(cell).size ? h("p", { class: "lead" }, "Claimed heads by role and layer. A line joins two heads if the later one reads more of the earlier one's output than it would with random weights.") : null,
    h("div", { class: "controls" }, select("Cell", CELLS.map((one) => [one.name, cellTitle(one)]), cell.name, (next) => { location.hash = `#circuit/${next}`; })),
    box,
  ];
}

function circuitContent(cell, redraw) {
  const found = rows(cell, "verdicts");
  if (!found.length) {
    const why = cell.claims && cell.claims.none ? cell.claims.none : "no circuit is claimed";
    const proposed = rows(cell, "candidates").length;
    return [h("p", { class: "notice" }, `No claimed heads: ${why}.`),
      proposed ? h("h2", {}, "Candidates") : null,
      proposed ? h("p", { class: "note" }, "These are the strongest heads by each role's predictions. They were chosen for that, so this is no verdict.") : null,
      proposed ? h("div", { class: "scroll" }, candidateTable(cell, ranks, true)) : null];
  }
  const edges = circuitEdges(cell);
  const top = edges.reduce((most, edge) => Math.max(most, edge.score_above_random), 0);
  const shown = edges.filter((edge) => edgeChoice[edge.mode] && edge.score_above_random >= edgeChoice.least * top)
    .sort((a, b) => b.score_above_random - a.score_above_random).slice(0, MOST_EDGES);
  const box = (mode) => {
    const swatch = h("i", { class: "swatch" });
    swatch.style.borderTopColor = shade(REPORT.palette.modes[mode]);
    swatch.style.borderTopStyle = { q: "solid", k: "dashed", v: "dotted" }[mode];
    return h("label", { class: "chip" }, h("input", { type: "checkbox", checked: edgeChoice[mode], onchange: (event) => { edgeChoice[mode] = event.target.checked; redraw(); } }), swatch, REPORT.wording.modes[mode]);
  };
  return [
    edges.length ? h("div", { class: "controls" }, h("fieldset", {}, h("legend", {}, "Composition"), ["q", "k", "v"].map(box)),
      h("label", {}, h("span", {}, "at least"), h("input", { type: "range", min: 0, max: 1, step: 0.05, value: edgeChoice.least, "aria-label": "least score above random, as a share of the strongest", onchange: (event) => { edgeChoice.least = Number(event.target.value); redraw(); } }),
        h("span", {}, `${number(edgeChoice.least * top, 3)} above random`))) : null,
    circuitGraph(cell, found, shown),
    edgeNote(cell, edges, shown),
    h("h2", {}, "Roles"),
    ...found.filter((row) => row.kind === "role").map((row) => roleCard(cell, row, found)),
  ];
}

/** Compositions between claimed heads: of this cell (the pairs that the claims name) and of an all-pairs cell of the same weights. */
function circuitEdges(cell) {
  const heads = claimed(cell);
  const edges = new Map();
  const key = (row) => `${row.mode} ${row.sender_layer}.${row.sender_head} ${row.receiver_layer}.${row.receiver_head}`;
  const whole = siblings(cell).find((other) => other.analysis === "composition" && other.composition);
  for (const [source, named] of [[cell, true], [whole, false]]) {
    for (const row of source ? rows(source, "composition") : []) {
      const [sender, receiver] = [`${row.sender_layer}.${row.sender_head}`, `${row.receiver_layer}.${row.receiver_head}`];
      if (row.score_above_random > 0 && heads.has(sender) && heads.has(receiver) && !edges.has(key(row))) edges.set(key(row), { ...row, sender, receiver, named: named && cell.analysis !== "composition" });
    }
  }
  return [...edges.values()];
}

function edgeNote(cell, edges, shown) {
  if (!edges.length) {
    const why = cell.composition ? "No composition between claimed heads is above random." : "No role of this task predicts a composition, so none was computed here; analysis=composition computes all pairs.";
    return h("p", { class: "note" }, why);
  }
  const others = edges.some((edge) => !edge.named);
  return h("p", { class: "note" }, `Width: the score above that of independent random weights. ${others ? "Full lines of colour: pairs that the claims name; pale ones: other pairs of claimed heads, from the all-pairs cell of the same weights." : "Pairs that the claims name; analysis=composition computes all pairs."}${shown.length === MOST_EDGES ? ` The ${MOST_EDGES} strongest are drawn.` : ""} A composition is a statement about weights: it does not say that the path carries anything on task inputs.`);
}

// --- the graph --------------------------------------------------------------------------------------------

function circuitGraph(cell, found, edges) {
  const heads = found.filter((row) => row.kind === "head");
  const byHead = claimed(cell);
  const roles = unique(found.map((row) => row.role));
  const depth = (role) => { const own = heads.filter((row) => row.role === role); return own.reduce((sum, row) => sum + row.layer, 0) / (own.length || 1); };
  roles.sort((a, b) => depth(a) - depth(b));
  const layers = unique(heads.map((row) => row.layer)).sort((a, b) => a - b);
  const [gapX, radius] = [54, 18];
  const count = (role) => heads.filter((row) => row.role === role).length;
  const home = (row) => [...byHead.get(headLabel(row))].sort((a, b) => count(a.role) - count(b.role))[0]; // the smallest of its roles
  const widest = (role) => Math.max(1, ...layers.map((layer) => heads.filter((row) => row.role === role && row.layer === layer && home(row) === row).length));
  const widths = roles.map((role) => Math.max(156, widest(role) * gapX + 40));
  const [left, top, gapY] = [76, 48, 92];
  const width = Math.max(520, left + widths.reduce((a, b) => a + b, 0) + 10);
  const height = top + layers.length * gapY;
  const centre = (k) => left + widths.slice(0, k).reduce((a, b) => a + b, 0) + widths[k] / 2;
  const y = (layer) => top + (layers.length - 1 - layers.indexOf(layer)) * gapY + gapY / 2;
  const spots = new Map();
  roles.forEach((role, k) => layers.forEach((layer) => {
    const own = heads.filter((row) => row.role === role && row.layer === layer && home(row) === row);
    own.forEach((row, m) => spots.set(headLabel(row), { row, x: centre(k) + (m - (own.length - 1) / 2) * gapX, y: y(layer) }));
  }));
  const most = Math.max(...edges.map((edge) => edge.score_above_random), 1e-9);
  const drawing = s("svg", { class: "plot circuit", viewBox: `0 0 ${width} ${height}`, width, height, role: "group", style: `min-width:${Math.min(width, 980)}px`,
    "aria-label": `${plural(byHead.size, "claimed head")} in ${plural(roles.length, "role")}, ${plural(edges.length, "composition")} above random` },
    layers.map((layer) => [s("line", { class: "gridline", x1: left - 14, x2: width, y1: y(layer), y2: y(layer) }), s("text", { class: "tick", x: left - 22, y: y(layer) + 4, "text-anchor": "end" }, `layer ${layer}`)]),
    roles.map((role, k) => s("text", { class: "strong", x: centre(k), y: 18, "text-anchor": "middle" }, roleName(role))),
    roles.map((role, k) => {
      const row = found.find((one) => one.kind === "role" && one.role === role);
      return row ? s("text", { class: "soft", x: centre(k), y: 36, "text-anchor": "middle", style: "font-size:11.5px" }, verdictText(row)) : null;
    }),
    edgesBent(edges, spots).reverse().map((edge) => graphEdge(edge, spots, most, radius)),
    [...spots].map(([label, spot]) => graphHead(cell, label, spot, byHead.get(label), radius, spot.row.layer === layers[layers.length - 1])));
  return figure({
    drawing, name: `circuit-${cell.model}-${cell.task}`,
    caption: [legend(new Set(heads.map((row) => row.verdict)))],
    table: () => [["mode", "sender", "receiver", "score", "above random", "percentile"], edges.map((edge) => [edge.mode, edge.sender, edge.receiver, edge.score, edge.score_above_random, edge.percentile])],
  });
}

const CLEARANCE = 24; // between a line and the middle of a head that it passes

/** The point that a line between two spots is drawn towards, so far beside the straight way. */
function middle(from, to, bend) {
  const [dx, dy] = [to.x - from.x, to.y - from.y];
  const far = Math.hypot(dx, dy) || 1;
  return [(from.x + to.x) / 2 - (dy / far) * bend, (from.y + to.y) / 2 + (dx / far) * bend];
}

/** Each edge with a bend of its own between its heads with which it passes no other head; or passes best, where none does. */
function edgesBent(edges, spots) {
  const taken = new Map();
  return edges.map((edge) => {
    const [from, to] = [spots.get(edge.sender), spots.get(edge.receiver)];
    const pair = `${edge.sender} ${edge.receiver}`;
    const others = [...spots.values()].filter((spot) => spot !== from && spot !== to);
    const start = { q: -16, k: 0, v: 16 }[edge.mode];
    const bends = [0, 16, -16, 36, -36, 60, -60, 90, -90].map((turn) => start + turn).filter((bend) => !(taken.get(pair) || []).some((other) => Math.abs(other - bend) < 12));
    const gap = (bend) => {
      const [mx, my] = middle(from, to, bend);
      return Math.min(Infinity, ...Array.from({ length: 24 }, (_, k) => 0.08 + (0.84 * k) / 23).flatMap((t) => {
        const [x, y] = [from.x, from.y].map((_, axis) => (1 - t) ** 2 * [from.x, from.y][axis] + 2 * t * (1 - t) * [mx, my][axis] + t * t * [to.x, to.y][axis]);
        return others.map((spot) => Math.hypot(spot.x - x, spot.y - y));
      }));
    };
    const bend = bends.find((one) => gap(one) >= CLEARANCE) ?? bends.reduce((best, one) => (gap(one) > gap(best) ? one : best));
    taken.set(pair, [...(taken.get(pair) || []), bend]);
    return { ...edge, bend };
  });
}

function graphEdge(edge, spots, most, radius) {
  const [from, to] = [spots.get(edge.sender), spots.get(edge.receiver)];
  const stroke = shade(REPORT.palette.modes[edge.mode]);
  const [mx, my] = middle(from, to, edge.bend);
  const cutAt = (x, y, ox, oy, by) => { const d = Math.hypot(ox - x, oy - y) || 1; return [x + ((ox - x) / d) * by, y + ((oy - y) / d) * by]; };
  const wide = 1 + (5 * edge.score_above_random) / most;
  const tipSize = 4 + wide;
  const [x1, y1] = cutAt(from.x, from.y, mx, my, radius + 1);
  const [x2, y2] = cutAt(to.x, to.y, mx, my, radius + tipSize + 1);
  const [hx, hy] = cutAt(to.x, to.y, mx, my, radius + 1);
  const angle = Math.atan2(hy - y2, hx - x2);
  const corner = (turn) => `${x2 + tipSize * 0.62 * Math.cos(angle + turn)} ${y2 + tipSize * 0.62 * Math.sin(angle + turn)}`;
  const text = `${edge.sender} → ${edge.receiver}, ${REPORT.wording.modes[edge.mode]}\nscore ${number(edge.score, 3)}, ${number(edge.score_above_random, 3)} above random\n${percent(edge.percentile)} of the sender's layer score no more`;
  return tip(s("g", { opacity: edge.named ? 0.9 : 0.32 },
    s("path", { d: `M${x1} ${y1} Q${mx} ${my} ${x2} ${y2}`, fill: "none", stroke, "stroke-width": wide, "stroke-dasharray": { q: null, k: "7 4", v: "2 3" }[edge.mode] }),
    s("path", { d: `M${hx} ${hy} L${corner(Math.PI / 2)} L${corner(-Math.PI / 2)} Z`, fill: stroke })), text);
}

function graphHead(cell, label, spot, claims, radius, last) {
  const first = spot.row;
  const stroke = shade(REPORT.palette.verdicts[first.verdict]);
  const also = claims.filter((row) => row !== first).map((row) => roleName(row.role));
  const said = claims.map((row) => `${roleName(row.role)}: ${verdictText(row)}`);
  return tip(s("a", { href: headLink(cell, label), "aria-label": `head ${label}, ${said.join(", ")}` },
    s("circle", { class: "focus", cx: spot.x, cy: spot.y, r: radius, fill: css("--ground"), stroke, "stroke-width": first.verdict === "untestable" ? 1.5 : 3, "stroke-dasharray": first.verdict === "untestable" || first.verdict === "out_of_scope" ? "3 3" : null }),
    s("text", { class: "strong", x: spot.x, y: spot.y + 4, "text-anchor": "middle", style: `font-size:${label.length > 4 ? 10.5 : 12.5}px` }, label),
    ["untestable", "out_of_scope"].includes(first.verdict) ? null : s("svg", { x: spot.x + radius - 7, y: spot.y - radius - 5, width: 13, height: 13 }, s("circle", { cx: 6.5, cy: 6.5, r: 6.5, fill: css("--ground") }), glyphInside(first.verdict)),
    also.length ? s("text", { class: "tick halo", x: spot.x, y: last ? spot.y - radius - 9 : spot.y + radius + 13, "text-anchor": "middle" }, `also ${also.join(", ")}`) : null), `${label}\n${said.join("\n")}`);
}

function glyphInside(name) {
  const mark = glyph(name);
  mark.setAttribute("width", 11);
  mark.setAttribute("height", 11);
  mark.setAttribute("x", 1);
  mark.setAttribute("y", 1);
  mark.removeAttribute("class");
  return mark;
}

function roleCard(cell, row, found) {
  const tests = rows(cell, "tests").filter((test) => test.role === row.role && test.layer === null);
  const details = h("details", {}, h("summary", { class: "small" }, "against the nulls"));
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) details.append(...nullStrips(tests, roleName(row.role)));
  });
  return h("section", { class: "card" },
    h("h3", {}, roleName(row.role)[0].toUpperCase() + roleName(row.role).slice(1), verdict(row)),
    row.establishes ? h("p", { class: "says" }, row.establishes) : null,
    row.does_not_establish ? h("p", { class: "small muted" }, row.does_not_establish) : null,
    facts([
      ["Primary metric", row.primary ? predictedTitle(row.primary, row.prediction) : null],
      ["AUC within layer", row.primary ? (isNumber(row.effect) ? `${number(row.effect)}${isNumber(row.ci_low) ? ` (95 % interval ${number(row.ci_low)} to ${number(row.ci_high)})` : " (no interval)"}` : "unavailable") : null],
      ["q", isNumber(row.q) ? `${probability(row.q)} under the weakest of: ${row.nulls}${row.held ? `; held under: ${row.held}` : "; held under none"}` : null],
      ["Why", row.reason && !(row.establishes || "").includes(row.reason) ? row.reason : null],
      ["Heads", h("div", { class: "heads" }, found.filter((one) => one.kind === "head" && one.role === row.role).map((one) => headMark(cell, one)))],
    ]),
    tests.length ? details : null);
}
