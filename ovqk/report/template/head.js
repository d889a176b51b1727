// The page of one head.

const spaceChoice = { ov: "vocab", qk: "vocab" };
const kindChoice = { ov: "singular", qk: "singular" };

function headPage(name, label) {
  const cell = BY_NAME.get(name) || CELLS.find((one) => claimed(one).size) || CELLS[0];
  const marks = [...claimed(cell).keys(), ...candidates(cell).keys()];
  const [layer, head] = (label || marks[0] || "0.0").split(".").map(Number);
  if (!(layer >= 0 && layer < cell.layers && head >= 0 && head < cell.heads)) {
    return [h("h1", { tabindex: -1 }, "No such head"), h("p", {}, `${cell.model} has layers 0 to ${cell.layers - 1} of heads 0 to ${cell.heads - 1}.`), headChooser(cell, 0, 0)];
  }
  const roles = (claimed(cell).get(`${layer}.${head}`) || []).map((row) => roleName(row.role));
  const what = roles.length ? `Claimed as ${sentenceList(roles)} for ${cell.task}.` : cell.task === "none" ? "This cell has no task, so nothing is claimed about the head." : `Not claimed for ${cell.task}.`;
  return [
    h("h1", { tabindex: -1 }, `Head ${layer}.${head} of ${cell.label}`),
    h("p", { class: "lead" }, what),
    headChooser(cell, layer, head),
    ...headVerdicts(cell, layer, head),
    ...headNulls(cell, layer, head),
    ...headOnPrompts(cell, layer, head),
    h("h2", {}, "OV: what it copies"),
    circuitSection(cell, layer, head, "ov"),
    ...relationPairs(cell, layer, head),
    h("h2", {}, "QK: where it looks"),
    circuitSection(cell, layer, head, "qk"),
    h("h2", {}, "Position or content"),
    h("div", { class: "grid3" }, symmetryScatter(cell, layer, head), shareBar(cell, layer, head), offsetPlot(cell, layer, head)),
    h("h2", {}, "Composition"),
    ...partnerPanels(cell, layer, head),
    h("h2", {}, "All metrics"),
    metricTable(cell, layer, head),
  ];
}

function headChooser(cell, layer, head) {
  const marks = unique([...claimed(cell).keys(), ...candidates(cell).keys()]);
  const link = (l, k, text) => (l >= 0 && l < cell.layers && k >= 0 && k < cell.heads ? h("a", { href: headLink(cell, `${l}.${k}`) }, text) : null);
  const place = layer * cell.heads + head;
  const at = (n) => [Math.floor(n / cell.heads), n % cell.heads];
  return h("div", {},
    h("div", { class: "controls" },
      select("Cell", CELLS.map((one) => [one.name, cellTitle(one)]), cell.name, (next) => {
        const other = BY_NAME.get(next);
        location.hash = other.model === cell.model ? headLink(other, `${layer}.${head}`) : headLink(other, unique([...claimed(other).keys(), ...candidates(other).keys(), "0.0"])[0]);
      }),
      select("Layer", Array.from({ length: cell.layers }, (_, k) => [String(k), String(k)]), String(layer), (next) => { location.hash = headLink(cell, `${next}.${head}`); }),
      select("Head", Array.from({ length: cell.heads }, (_, k) => [String(k), String(k)]), String(head), (next) => { location.hash = headLink(cell, `${layer}.${next}`); }),
      h("span", { class: "pager" }, place > 0 ? link(...at(place - 1), "← previous") : null, place + 1 < cell.layers * cell.heads ? link(...at(place + 1), "next →") : null,
        h("a", { href: `#atlas/${encodeURIComponent(cell.task)}` }, "atlas"))),
    marks.length ? h("div", { class: "pager" }, h("span", { class: "muted" }, claimed(cell).size ? "Claimed:" : "Candidates:"), marks.map((mark) =>
      h("a", { href: headLink(cell, mark), class: "mark", "aria-current": mark === `${layer}.${head}` ? "true" : null },
        (claimed(cell).get(mark) || []).map((row) => glyph(row.verdict)), mark))) : null);
}

function cellTitle(cell) {
  const same = CELLS.filter((other) => other.label === cell.label && other.task === cell.task);
  return `${cell.label} / ${cell.task}${same.length > 1 || cell.analysis !== "b03" ? ` / ${cell.analysis}` : ""}`;
}

// --- verdict ----------------------------------------------------------------------------------------------

function headVerdicts(cell, layer, head) {
  const found = claimed(cell).get(`${layer}.${head}`) || [];
  const proposals = candidates(cell).get(`${layer}.${head}`) || [];
  if (found.length) return [h("h2", {}, "Verdict"), ...found.map((row) => verdictCard(cell, row))];
  if (proposals.length) {
    return [h("h2", {}, "A candidate, not a verdict"), h("p", { class: "note" }, "No circuit is claimed for this model on this task. The heads are chosen for being the strongest, so no p-value is shown: z says how far a head stands out among all heads, and gap how far from the next one (0 if it ties). ", REPORT.wording.candidates_worth),
      h("div", { class: "scroll" }, candidateTable(cell, (row) => isHead(row, layer, head)))];
  }
  const elsewhere = siblings(cell).filter((other) => other !== cell && claimed(other).has(`${layer}.${head}`));
  if (!elsewhere.length) return [];
  return [h("p", {}, "Claimed for ", elsewhere.map((other, k) => [k ? ", " : "", h("a", { href: headLink(other, `${layer}.${head}`) }, other.task)]), ".")];
}

function verdictCard(cell, row) {
  const patterns = Object.entries(REPORT.wording.patterns)
    .filter(([key]) => row[key] !== null && row[key] !== undefined).map(([key, name]) => `${name}: ${row[key] ? "yes" : "no"}`);
  const role = rows(cell, "verdicts").find((other) => other.kind === "role" && other.role === row.role);
  return h("section", { class: "card" },
    h("h3", {}, `${roleName(row.role)[0].toUpperCase()}${roleName(row.role).slice(1)}`, verdict(row)),
    row.establishes ? h("p", { class: "says" }, row.establishes) : null,
    row.does_not_establish ? h("p", { class: "small muted" }, row.does_not_establish) : null,
    facts([
      ["Primary metric", row.primary ? `${predictedTitle(row.primary, row.prediction)}${isNumber(row.value) ? `, ${number(row.value, 3)}` : ", unavailable"}` : null],
      ["Within its layer", isNumber(row.percentile) ? `percentile ${percent(row.percentile)}, AUC ${number(row.effect)}${isNumber(row.ci_low) ? ` (95 % interval ${number(row.ci_low)} to ${number(row.ci_high)})` : ""}` : null],
      ["q", isNumber(row.q) ? `${probability(row.q)} under the weakest of: ${row.nulls}${row.held ? `; held under: ${row.held}` : "; held under none"}` : null],
      ["Why", row.reason && !(row.establishes || "").includes(row.reason) ? row.reason : null],
      ["Evidence", row.evidence],
      ["Patterns", patterns.join("; ")],
      ["The role together", role ? h("span", {}, verdict(role), ". ", role.establishes) : null],
      ["Claim", cell.claims && cell.claims.source ? `${cell.claims.source} (${cell.claims.reliability})${cell.claims.note ? ` – ${cell.claims.note}` : ""}` : null],
    ]));
}

function candidateTable(cell, filter, link = false) {
  const found = rows(cell, "candidates").filter(filter);
  return h("table", {}, h("thead", {}, h("tr", {}, ["candidate for", "rank", "head", "metric", "value", "z, all heads", "gap to next", "percentile in layer"].map((title, k) => h("th", { scope: "col", class: k > 3 || k === 1 ? "number" : null }, title)))),
    h("tbody", {}, found.map((row) => h("tr", {}, h("td", {}, roleName(row.role)), h("td", { class: "number" }, row.rank),
      h("td", {}, link ? h("a", { href: headLink(cell, headLabel(row)) }, headLabel(row)) : headLabel(row)),
      h("td", { class: "small" }, `${predictedTitle(row.metric, row.prediction)}${row.primary ? "" : row.exploratory ? " (exploratory)" : " (secondary)"}`),
      h("td", { class: "number" }, number(row.value, 3)), ...["z", "gap"].map((name) => h("td", { class: "number" }, isNumber(row[name]) ? number(row[name], 1) : "unavailable")), h("td", { class: "number" }, percent(row.percentile))))));
}

function headNulls(cell, layer, head) {
  const tests = rows(cell, "tests").filter((row) => isHead(row, layer, head));
  if (!tests.length) return [];
  const roles = unique(tests.map((row) => row.role));
  return [h("h2", {}, "Against the nulls"),
    h("p", { class: "note" }, "Grey bar: 5 to 95 % of the null, its thin line the whole range, its tick the median. Dot: the head; filled if the null counts for the verdict, blue if q < 0.05. Heads of nearby layers are compared by values standardised within their layers, so the head is shown by its percentile among them."),
    ...roles.flatMap((role) => [
      roles.length > 1 ? h("h3", { style: "margin-top:18px;font-size:18px" }, `As ${roleName(role)}`) : null,
      ...nullStrips(tests.filter((row) => row.role === role), `head ${layer}.${head}`),
    ])];
}

// --- circuits ---------------------------------------------------------------------------------------------

function circuitSection(cell, layer, head, circuit) {
  const box = h("div");
  const draw = () => box.replaceChildren(...circuitPanels(cell, layer, head, circuit, draw).filter(Boolean));
  draw();
  return box;
}

function circuitPanels(cell, layer, head, circuit, redraw) {
  const spectra = spectraOf(cell, layer, head)[circuit];
  if (!spectra) return [missing(cell.spectra ? (cell.columns_there.some((name) => REPORT.metrics[name].circuit === circuit) ? "not on this page: see spectra.parquet" : `analysis ${cell.analysis} does not take ${circuit.toUpperCase()} apart`) : "no spectra were recorded")];
  const spaces = ["vocab", "residual"].filter((space) => spectra[space] && (spectra[space].eigen || []).length);
  const space = spaces.includes(spaceChoice[circuit]) ? spaceChoice[circuit] : spaces[0];
  const parts = [];
  if (spaces.length > 1) {
    parts.push(h("div", { class: "controls" }, select("Eigenvalues", spaces.map((name) => [name, SPACES[name]]), space, (name) => { spaceChoice[circuit] = name; redraw(); })));
  } else if (!spaces.includes("vocab")) {
    parts.push(h("p", { class: "missing" }, `between tokens unavailable: ${whyMissing(cell, RATIOS[circuit].vocab, layer)}`));
  }
  if (cell.spectra.offset) parts.push(h("p", { class: "note" }, `At query-key offset ${cell.spectra.offset}.`));
  parts.push(h("div", { class: "grid3" },
    space ? eigenPlane(cell, layer, head, circuit, space, spectra[space]) : null,
    spectra.residual && (spectra.residual.singular || []).length ? singularCurve(cell, layer, head, circuit, spectra.residual) : null,
    profile(cell, layer, head, circuit)));
  parts.push(h("h3", { style: "margin-top:30px" }, circuit === "ov" ? "Tokens that its leading components read and write" : "Tokens that its leading components match, as query and as key"));
  if (having(cell, "directions")) {
    parts.push(h("div", { class: "controls" }, select("Components", [["singular", "singular: strongest maps"], ["eigen", "eigen: what is mapped to itself"]], kindChoice[circuit], (kind) => { kindChoice[circuit] = kind; redraw(); })));
  }
  parts.push(componentTable(cell, layer, head, circuit, kindChoice[circuit]));
  if (having(cell, "directions")) parts.push(h("p", { class: "note" }, "The number behind each list is its contrast: the mean score of its ten tokens over the standard deviation of all tokens' scores. The best ten of 50,000 normal numbers have 3.8: a list near that holds nothing in particular."));
  return parts;
}

/** Which pairs of the task's words the head raises or lowers, if the task is a relation. */
function relationPairs(cell, layer, head) {
  if (!cell.relations) return [];
  const { pairs, heads } = cell.relations;
  const { raised, lowered } = heads[layer * cell.heads + head];
  const place = pairs.every(([source, target]) => source === target) ? "the first of all tokens" : "among the first ten of all tokens";
  const line = (title, places) => [title, places.length ? h("span", { class: "tokens" }, places.map((k) => token(`${pairs[k][0]} → ${pairs[k][1]}`))) : "none"];
  const others = pairs.map((_, k) => k).filter((k) => !raised.includes(k));
  return [h("h3", { style: "margin-top:30px" }, "Pairs of the task's words"),
    h("p", { class: "note" }, `If the head attends to the source, is the target ${place} that it raises, or of those that it lowers? By the weights, on the direct path.`),
    h("div", { id: "pairs" }, facts([line(`Raised: ${raised.length} of ${pairs.length}`, raised), line(`Lowered: ${lowered.length} of ${pairs.length}`, lowered), line(`Not raised: ${others.length}`, others)]))];
}

// --- all metrics ------------------------------------------------------------------------------------------

function metricTable(cell, layer, head) {
  const place = layer * cell.heads + head;
  const line = (name) => {
    const values = column(cell, name);
    const own = values ? values[place] : null;
    const peers = values ? values.slice(layer * cell.heads, (layer + 1) * cell.heads).filter((x, k) => isNumber(x) && k !== head) : [];
    const metric = REPORT.metrics[name];
    const shown = isNumber(own) ? [h("td", { class: "number" }, number(own, 3)), h("td", { class: "number" }, peers.length ? percent(peers.filter((x) => x <= own).length / peers.length) : "")]
      : [h("td", { class: "missing small", colspan: 2 }, `unavailable: ${whyMissing(cell, name, layer)}`)];
    return h("tr", {}, h("td", {}, metric.title), shown, h("td", { class: "number" }, metric.chance === null ? "" : tickText(metric.chance)), h("td", { class: "small muted" }, metric.formula));
  };
  const unstable = (cell.unstable || {})[`${layer}.${head}`];
  const names = Object.keys(REPORT.metrics).filter((name) => cell.columns_there.includes(name));
  return h("div", {}, unstable ? h("p", { class: "notice" }, `Decided by rounding (they move under a change of basis inside the head): ${unstable}`) : null,
    h("details", {}, h("summary", {}, `${plural(names.length, "metric")}, with their place in the layer`),
      h("div", { class: "scroll", tabindex: 0 }, h("table", { id: "metrics" }, h("thead", {}, h("tr", {}, [["metric"], ["value", "number"], ["not above it in its layer", "number"], ["by chance", "number"], ["formula"]].map(([title, kind]) => h("th", { scope: "col", class: kind || null }, title)))),
        h("tbody", {}, names.map(line))))));
}
