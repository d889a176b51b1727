// Circuit: the claimed heads as a graph by role, joined where one reads what another writes.

const edgeChoice = { q: true, k: true, v: true, least: 0 };

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
      proposed ? h("p", { class: "note" }, "These are the strongest heads by each role's predictions. They were chosen for that, so this is no verdict. ", REPORT.wording.candidates_worth) : null,
      proposed ? h("div", { class: "scroll" }, candidateTable(cell, ranks, true)) : null];
  }
  const edges = cell.graph.edges;
  const top = edges.length ? edges[0].above : 0;
  const shown = edges.filter((edge) => edgeChoice[edge.mode] && edge.above >= edgeChoice.least * top);
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
    edgeNote(cell),
    h("h2", {}, "Roles"),
    ...found.filter((row) => row.kind === "role").map((row) => roleCard(cell, row, found)),
  ];
}

function edgeNote(cell) {
  const { edges, more } = cell.graph;
  if (!edges.length) {
    const why = cell.composition ? "No composition between claimed heads is above random." : "No role of this task predicts a composition, so none was computed here; analysis=composition computes all pairs.";
    return h("p", { class: "note" }, why);
  }
  const others = edges.some((edge) => !edge.named);
  return h("p", { class: "note" }, `Width: the score above that of independent random weights. ${others ? "Full lines of colour: pairs that the claims name; pale ones: other pairs of claimed heads, from the all-pairs cell of the same weights." : "Pairs that the claims name; analysis=composition computes all pairs."}${more ? ` The ${edges.length} strongest are drawn, of ${edges.length + more}.` : ""} A composition is a statement about weights: it does not say that the path carries anything on task inputs.`);
}

// --- the graph --------------------------------------------------------------------------------------------

const RADIUS = 18; // of a head

/** The claimed heads at the places that Python chose, which the saved figure has too. */
function circuitGraph(cell, found, edges) {
  const { roles, layers, heads, width: wide } = cell.graph;
  const byHead = claimed(cell);
  const [left, top] = [76, 92];
  const width = Math.max(520, left + wide + 10);
  const highest = layers[layers.length - 1];
  const height = top + highest[1] + 52;
  const y = (up) => top + highest[1] - up;
  const spots = new Map(heads.map(([label, x, up, role, also]) => [label, { x: left + x, y: y(up), role, also, last: up === highest[1] }]));
  const most = edges.length ? cell.graph.edges[0].above : 1;
  const drawing = s("svg", { class: "plot circuit", viewBox: `0 0 ${width} ${height}`, width, height, role: "group", style: `min-width:${Math.min(width, 980)}px`,
    "aria-label": `${plural(byHead.size, "claimed head")} in ${plural(roles.length, "role")}, ${plural(edges.length, "composition")} above random` },
    layers.map(([layer, up]) => [s("line", { class: "gridline", x1: left - 14, x2: width, y1: y(up), y2: y(up) }), s("text", { class: "tick", x: left - 22, y: y(up) + 4, "text-anchor": "end" }, `layer ${layer}`)]),
    roles.map(([role, x, title]) => {
      const row = found.find((one) => one.kind === "role" && one.role === role);
      return [s("text", { class: "strong", x: left + x, y: 18, "text-anchor": "middle" }, title),
        row ? s("text", { class: "soft", x: left + x, y: 36, "text-anchor": "middle", style: "font-size:11.5px" }, verdictText(row)) : null];
    }),
    [...edges].reverse().map((edge) => graphEdge(edge, spots, [left + edge.middle[0], y(edge.middle[1])], most)),
    [...spots].map(([label, spot]) => graphHead(cell, label, spot, byHead.get(label))));
  return figure({
    drawing, name: `circuit-${cell.model}-${cell.task}`,
    caption: [legend(new Set(found.filter((row) => row.kind === "head").map((row) => row.verdict)))],
    table: () => [["mode", "sender", "receiver", "score", "above random", "percentile"], edges.map((edge) => [edge.mode, edge.sender, edge.receiver, edge.score, edge.above, edge.percentile])],
  });
}

function graphEdge(edge, spots, [mx, my], most) {
  const [from, to] = [spots.get(edge.sender), spots.get(edge.receiver)];
  const stroke = shade(REPORT.palette.modes[edge.mode]);
  const cutAt = (x, y, ox, oy, by) => { const d = Math.hypot(ox - x, oy - y) || 1; return [x + ((ox - x) / d) * by, y + ((oy - y) / d) * by]; };
  const wide = 1 + (5 * edge.above) / most;
  const tipSize = 4 + wide;
  const [x1, y1] = cutAt(from.x, from.y, mx, my, RADIUS + 1);
  const [x2, y2] = cutAt(to.x, to.y, mx, my, RADIUS + tipSize + 1);
  const [hx, hy] = cutAt(to.x, to.y, mx, my, RADIUS + 1);
  const angle = Math.atan2(hy - y2, hx - x2);
  const corner = (turn) => `${x2 + tipSize * 0.62 * Math.cos(angle + turn)} ${y2 + tipSize * 0.62 * Math.sin(angle + turn)}`;
  const text = `${edge.sender} → ${edge.receiver}, ${REPORT.wording.modes[edge.mode]}\nscore ${number(edge.score, 3)}, ${number(edge.above, 3)} above random\n${percent(edge.percentile)} of the sender's layer score no more`;
  return tip(s("g", { opacity: edge.named ? 0.9 : 0.32 },
    s("path", { d: `M${x1} ${y1} Q${mx} ${my} ${x2} ${y2}`, fill: "none", stroke, "stroke-width": wide, "stroke-dasharray": { q: null, k: "7 4", v: "2 3" }[edge.mode] }),
    s("path", { d: `M${hx} ${hy} L${corner(Math.PI / 2)} L${corner(-Math.PI / 2)} Z`, fill: stroke })), text);
}

function graphHead(cell, label, spot, claims) {
  const first = claims.find((row) => row.role === spot.role);
  const stroke = shade(REPORT.palette.verdicts[first.verdict]);
  const said = claims.map((row) => `${roleName(row.role)}: ${verdictText(row)}`);
  return tip(s("a", { href: headLink(cell, label), "aria-label": `head ${label}, ${said.join(", ")}` },
    s("circle", { class: "focus", cx: spot.x, cy: spot.y, r: RADIUS, fill: css("--ground"), stroke, "stroke-width": first.verdict === "untestable" ? 1.5 : 3, "stroke-dasharray": first.verdict === "untestable" || first.verdict === "out_of_scope" ? "3 3" : null }),
    s("text", { class: "strong", x: spot.x, y: spot.y + 4, "text-anchor": "middle", style: `font-size:${label.length > 4 ? 10.5 : 12.5}px` }, label),
    ["untestable", "out_of_scope"].includes(first.verdict) ? null : s("svg", { x: spot.x + RADIUS - 7, y: spot.y - RADIUS - 5, width: 13, height: 13 }, s("circle", { cx: 6.5, cy: 6.5, r: 6.5, fill: css("--ground") }), glyphInside(first.verdict)),
    spot.also ? s("text", { class: "tick halo", x: spot.x, y: spot.last ? spot.y - RADIUS - 9 : spot.y + RADIUS + 13, "text-anchor": "middle" }, spot.also) : null), `${label}\n${said.join("\n")}`);
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
  const tests = rows(cell, "tests").filter((test) => test.role === row.role && test.of_role);
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
