// Panels of one head: its spectra, its tokens, its positions, its partners, its nulls.

// --- spectra ----------------------------------------------------------------------------------------------

const { spaces: SPACES, panels: PANELS, axes: AXES } = REPORT.wording;

function spectraOf(cell, layer, head) {
  return cell.spectra ? REPORT.pool[cell.spectra.heads[layer * cell.heads + head]] : {};
}

/** [re, im] of every eigenvalue: of each conjugate pair one is kept, and mirrored here. */
function eigenvalues(flat) {
  const found = [];
  for (let k = 0; k < flat.length; k += 2) {
    found.push([flat[k], flat[k + 1]]);
    if (flat[k + 1] > 0) found.push([flat[k], -flat[k + 1]]);
  }
  return found;
}

const DECADES = REPORT.limits.decades;

/** Eigenvalues in the complex plane: angle kept, modulus by its logarithm (the form of Elhage et al. 2021). */
function eigenPlane(cell, layer, head, circuit, space, spectrum) {
  const points = eigenvalues(spectrum.eigen).map(([re, im]) => ({ re, im, size: Math.hypot(re, im) }));
  const largest = Math.max(...points.map((point) => point.size));
  const [width, radius] = [340, 122];
  const [cx, cy] = [170, 146];
  const gauge = ratioGauge(cell, layer, head, circuit, space, 316);
  const outer = Math.ceil(Math.log10(largest || 1) * 2 - 1e-9) / 2;
  const at = (size) => (radius * Math.max(0, Math.log10(size || 1e-30) - (outer - DECADES))) / DECADES;
  const rings = [];
  for (let power = Math.floor(outer); power > outer - DECADES + 0.2; power -= 1) rings.push(power);
  const [left, right] = REPORT.wording.ends[circuit][space];
  const scale = { kind: "diverging", low: -1, centre: 0, high: 1 };
  const inner = points.filter((point) => at(point.size) <= 0).length;
  const way = clearWay(points.map((point) => {
    const r = point.size ? at(point.size) / point.size : 0;
    return [r * point.re, -r * point.im];
  }), rings.map((power) => at(10 ** power)).filter((r) => r > 12));
  const drawn = svg(width, 378, `${points.length} eigenvalues of the ${circuit.toUpperCase()} circuit of head ${layer}.${head} ${SPACES[space]}, largest modulus ${number(largest)}. ${gauge.said}`,
    s("g", { "aria-hidden": "true" },
      s("path", { d: `M${cx} ${cy - radius} A${radius} ${radius} 0 0 1 ${cx} ${cy + radius} Z`, fill: between(stops(scale), 0.9), opacity: 0.07 }),
      s("path", { d: `M${cx} ${cy - radius} A${radius} ${radius} 0 0 0 ${cx} ${cy + radius} Z`, fill: between(stops(scale), 0.1), opacity: 0.07 }),
      s("circle", { cx, cy, r: radius, fill: "none", class: "axis" }),
      rings.map((power) => [
        s("circle", { cx, cy, r: at(10 ** power), fill: "none", class: "gridline" }),
        at(10 ** power) > 12 ? s("text", { class: "tick halo", x: cx + at(10 ** power) * way[0], y: cy + at(10 ** power) * way[1] + 4, "text-anchor": "middle" }, powerText(power)) : null,
      ]),
      s("line", { class: "gridline", x1: cx - radius, x2: cx + radius, y1: cy, y2: cy }),
      s("line", { class: "gridline", x1: cx, x2: cx, y1: cy - radius, y2: cy + radius }),
      s("text", { class: "soft", x: cx + radius, y: cy + radius + 14, "text-anchor": "end" }, `${right} →`),
      s("text", { class: "soft", x: cx - radius, y: cy + radius + 14 }, `← ${left}`),
      s("text", { class: "tick halo", x: cx + radius + 4, y: cy + 4 }, "Re"),
      s("text", { class: "tick", x: cx, y: cy - radius - 5, "text-anchor": "middle" }, "Im")),
    points.map((point) => {
      const r = at(point.size);
      const [ux, uy] = point.size ? [point.re / point.size, point.im / point.size] : [0, 0];
      return tip(s("circle", { cx: cx + r * ux, cy: cy - r * uy, r: 4.4, fill: between(stops(scale), ux < 0 ? 0.12 * (1 + ux) : 0.88 + 0.12 * ux), "fill-opacity": 0.78, class: "halo", style: "stroke-width:1px" }),
        `λ = ${number(point.re, 3)}${point.im ? ` ${point.im > 0 ? "+" : "−"} ${number(Math.abs(point.im), 3)} i` : ""}\n|λ| = ${number(point.size, 3)}`);
    }), gauge.drawn);
  const cut = points.length < spectrum.of ? ` The ${points.length} largest of ${spectrum.of}.` : "";
  const small = inner ? ` ${plural(inner, "value")} below ${powerText(outer - DECADES)} ${inner === 1 ? "lies" : "lie"} at the centre.` : "";
  return figure({
    title: `${circuit.toUpperCase()} ${PANELS.eigenvalues}`,
    drawing: drawn,
    caption: `${SPACES[space][0].toUpperCase()}${SPACES[space].slice(1)}. Angle as it is, distance from the centre by log |λ|.${small}${cut} Below: ${gauge.caption}`,
    name: `eigenvalues-${cell.model}-${layer}.${head}-${circuit}`,
    table: () => [["Re λ", "Im λ", "|λ|"], points.map((point) => [point.re, point.im, point.size])],
  });
}

/** The direction in which the rings' labels lie farthest from the dots (all of them relative to the centre). */
function clearWay(dots, radii) {
  const ways = [45, 60, 30, 75, 120, 135, 105, 150].map((angle) => [Math.cos((angle * Math.PI) / 180), -Math.sin((angle * Math.PI) / 180)]);
  const gap = ([ux, uy]) => Math.min(...radii.flatMap((r) => dots.map(([x, y]) => Math.hypot(r * ux - x, r * uy - y))));
  return ways.reduce((best, way) => (gap(way) > gap(best) ? way : best));
}

function powerText(power) {
  const size = 10 ** power;
  return size >= 0.01 && size < 10000 ? tickText(Number(size.toPrecision(2))) : `1e${Math.round(power * 10) / 10}`.replace("e-", "e−");
}

const RATIOS = REPORT.shown.ratios;

/** A metric's range. */
function bounds(metric) {
  return [REPORT.metrics[metric].low, REPORT.metrics[metric].high];
}

/** The eigenvalue ratio on its range, with the band of the spectrum null if any cell of these weights drew it. */
function ratioGauge(cell, layer, head, circuit, space, top) {
  const metric = RATIOS[circuit][space];
  const found = value(cell, metric, layer, head);
  if (!isNumber(found)) return { drawn: null, said: "", caption: `${metricTitle(metric)} is unavailable: ${whyMissing(cell, metric, layer)}.` };
  const x = linear(bounds(metric), [48, 292]);
  const row = spectrumRow(cell, metric, layer, head);
  const scale = { kind: "diverging", low: -1, centre: 0, high: 1 };
  const band = row ? [quantile(row, 0.05), quantile(row, 0.5), quantile(row, 0.95)] : null;
  const y = top + 28;
  const drawn = s("g", {},
    s("line", { class: "axis", x1: x(-1), x2: x(1), y1: y, y2: y }),
    band ? s("rect", { x: x(band[0]), y: y - 7, width: Math.max(2, x(band[2]) - x(band[0])), height: 14, rx: 2, fill: shade(REPORT.palette.band) }) : null,
    band ? s("line", { x1: x(band[1]), x2: x(band[1]), y1: y - 7, y2: y + 7, stroke: css("--muted"), "stroke-width": 1.5 }) : null,
    [-1, 0, 1].map((at) => s("text", { class: "tick", x: x(at), y: y + 23, "text-anchor": "middle" }, tickText(at))),
    s("circle", { cx: x(found), cy: y, r: 6.5, fill: colour(scale, found), stroke: css("--ink"), "stroke-width": 1.5 }),
    s("text", { class: "strong", x: x(found), y: y - 13, "text-anchor": "middle" }, number(found)));
  const against = band
    ? `Grey: 5 to 95 % (line: median) of this ratio for heads of the same singular values between random frames${row.cell === cell ? "" : ` (drawn for task ${row.cell.task})`}.`
    : "The spectrum null of this ratio was not drawn: it is drawn only for metrics that a claimed head's role predicts.";
  return {
    drawn,
    said: `${metricTitle(metric)} ${number(found)}${band ? `; 5 to 95 % of the spectrum null ${number(band[0])} to ${number(band[2])}` : ""}`,
    caption: `${metricTitle(metric)} = sum λ / sum |λ|, the mean of cos(angle) weighted by |λ|. ${against}`,
  };
}

/** The spectrum null's row of a metric for a head, from this cell or one of the same weights. */
function spectrumRow(cell, metric, layer, head) {
  for (const other of siblings(cell)) {
    const row = rows(other, "tests").find((test) => test.null === "spectrum" && test.metric === metric && isHead(test, layer, head));
    if (row && row.quantiles && row.quantiles.length) return { ...row, cell: other };
  }
  return null;
}

function quantile(row, q) {
  return row.quantile_values[row.quantiles.indexOf(q)];
}

/** sigma_k / sigma_1, with the middle of all heads of the model. */
function singularCurve(cell, layer, head, circuit, spectrum) {
  const sigma = spectrum.singular;
  const band = cell.spectra.bands[circuit].residual;
  const n = spectrum.of;
  const size = { width: 340, height: 232, left: 40, right: 14, bottom: 40 };
  const plot = axes({ ...size, x: { domain: [1, Math.max(2, n)], title: AXES.component, ticks: unique([1, ...ticks(1, n, 4).filter(Number.isInteger)]) }, y: { domain: [0, 1], title: AXES.singular } });
  const at = (values) => values.map((x, k) => [plot.atX(k + 1), plot.atY(x)]);
  const mine = at(sigma.map((x) => (sigma[0] ? x / sigma[0] : 0)));
  const ink = accent();
  const rank = value(cell, `${circuit}_rank90`, layer, head);
  const effective = value(cell, `${circuit}_effective_rank`, layer, head);
  const drawn = svg(size.width, size.height, `Singular values of ${circuit.toUpperCase()} of head ${layer}.${head}: ${n} values, the largest ${number(sigma[0], 3)}, effective rank ${number(effective, 1)}`,
    plot.group,
    band.length ? s("path", { d: `${path(at(band[0]))}${path(at(band[2]).reverse()).replace("M", "L")}Z`, fill: css("--line"), opacity: 0.45 }) : null,
    band.length ? s("path", { d: path(at(band[1])), fill: "none", stroke: css("--muted"), "stroke-width": 1.2, "stroke-dasharray": "3 3" }) : null,
    isNumber(rank) ? [s("line", { class: "reference", x1: plot.atX(rank), x2: plot.atX(rank), y1: plot.top, y2: plot.bottom }),
      s("text", { class: "tick halo", x: plot.atX(rank) + (rank > n / 2 ? -5 : 5), y: plot.top + 10, "text-anchor": rank > n / 2 ? "end" : "start" }, AXES.energy)] : null,
    s("path", { d: path(mine), fill: "none", stroke: ink, "stroke-width": 2 }),
    mine.map(([x, y], k) => tip(s("circle", { cx: x, cy: y, r: n > 40 ? 2 : 3.4, fill: ink }), `σ${k + 1} = ${number(sigma[k], 3)}`)));
  const cut = sigma.length < n ? ` The first ${sigma.length} of ${n}.` : "";
  return figure({
    title: `${circuit.toUpperCase()} ${PANELS.singular}`,
    drawing: drawn,
    caption: `σ₁ = ${number(sigma[0], 3)}; effective rank ${number(effective, 1)} of ${n}. Grey: the middle 90 % of this model's heads, dashed their median.${cut}`,
    name: `singular-${cell.model}-${layer}.${head}-${circuit}`,
    table: () => [["k", "sigma"], sigma.map((x, k) => [String(k + 1), x])],
  });
}

/** Where the head stands among all heads of its model, metric by metric. */
function profile(cell, layer, head, circuit) {
  const names = REPORT.shown.profile[circuit].filter((name) => REPORT.metrics[name]);
  const [width, line, left, right] = [340, 36, 8, 286];
  const place = layer * cell.heads + head;
  const there = names.filter((name) => column(cell, name));
  const drawn = svg(width, there.length * line + 6, `Head ${layer}.${head} among all heads of ${cell.model}: ${there.map((name) => `${metricTitle(name)} ${number(column(cell, name)[place])}`).join("; ")}`,
    there.map((name, k) => {
      const values = column(cell, name);
      const facts = REPORT.metrics[name];
      const finite = values.filter(isNumber);
      const bounds = cell.spans[name];
      const x = linear(bounds, [left, right]);
      const y = k * line + 26;
      const own = values[place];
      return [
        s("text", { class: "soft", x: left, y: y - 11, style: "font-size:12px" }, facts.title.replace(/^(OV|QK) /, "").replace(/^./, (letter) => letter.toUpperCase())),
        s("line", { class: "axis", x1: left, x2: right, y1: y, y2: y }),
        bounds[0] < 0 && bounds[1] > 0 ? s("line", { class: "axis", x1: x(0), x2: x(0), y1: y - 4, y2: y + 4 }) : null,
        specks(finite.map((one) => [x(one), y]), 2.6, css("--muted"), 0.3),
        isNumber(own) ? [s("circle", { cx: x(own), cy: y, r: 5.5, fill: accent(), class: "halo" }), s("text", { class: "strong", x: right + 12, y: y + 4 }, number(own))]
          : s("text", { class: "tick", x: right + 12, y: y + 4 }, "none"),
      ];
    }));
  const absent = names.filter((name) => !column(cell, name));
  return figure({
    title: PANELS.profile,
    drawing: drawn,
    caption: `Grey: the other heads. Each line spans the metric's range.${absent.length ? ` Unavailable: ${absent.map(metricTitle).join(", ")}.` : ""}`,
    name: `profile-${cell.model}-${layer}.${head}-${circuit}`,
    table: () => [["metric", "value"], there.map((name) => [name, column(cell, name)[place]])],
  });
}

// --- tokens -----------------------------------------------------------------------------------------------

const SHOWN_TOKENS = REPORT.limits.tokens;

function componentTable(cell, layer, head, circuit, kind) {
  const source = having(cell, "directions");
  if (!source) return missing(cell.tables.directions === undefined && cell.unavailable[RATIOS.ov.vocab] ? cell.unavailable[RATIOS.ov.vocab] : `analysis ${cell.analysis} read out no components`);
  const found = REPORT.pool[source.directions.heads[layer * cell.heads + head]].filter((row) => row.circuit === circuit && row.kind === kind);
  if (!found.length) return h("p", { class: "missing" }, "not on this page: see directions.parquet");
  const [reads, writes] = REPORT.wording.verbs[circuit];
  const contrast = (side, sign) => ((side || {}).contrast || {})[sign];
  const tokens = (side, sign) => h("div", { class: "tokens" }, ((side || {})[sign] || []).slice(0, SHOWN_TOKENS).map((place) => token(REPORT.tokens[place])),
    isNumber(contrast(side, sign)) ? h("span", { class: "note", title: "contrast: mean score of the list over the standard deviation of all tokens' scores" }, ` ${number(contrast(side, sign), 1)}`) : null);
  return h("div", { class: "scroll" }, h("table", { class: "components" },
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, kind === "singular" ? "σ" : "λ"), h("th", { scope: "col" }, h("span", { class: "skip" }, "sign")), h("th", { scope: "col" }, reads), h("th", { scope: "col" }, `→ ${writes}`))),
    h("tbody", {}, found.flatMap((row) => {
      const signs = ["plus", "minus"].filter((sign) => (row.read || {})[sign] || (row.write || {})[sign]);
      return signs.map((sign, k) => h("tr", { class: row.size > 1 ? "clustered" : null, style: k ? "border-top:0" : null },
        k ? null : h("th", { scope: "row", rowspan: signs.length }, componentName(row)),
        h("td", { class: "sign" }, row.im > 0 ? "" : sign === "plus" ? "+" : "−"),
        h("td", {}, tokens(row.read, sign)), h("td", {}, tokens(row.write, sign))));
    }))), found.some((row) => row.size > 1) ? h("p", { class: "note" }, REPORT.wording.cluster_note) : null);
}

function componentName(row) {
  const size = row.im > 0 ? `${number(row.value, 3)} ± ${number(row.im, 3)} i` : number(row.value, 3);
  return [size, isNumber(row.share) ? h("div", { class: "note" }, `${percent(row.share)} of energy`) : null,
    row.im > 0 ? h("div", { class: "note" }, "a plane") : null,
    row.size > 1 ? h("div", { class: "note", title: REPORT.wording.cluster_note }, REPORT.wording.cluster.replace("{size}", row.size)) : null];
}

// --- position or content ----------------------------------------------------------------------------------

/** Symmetry against the measured share of position, for every head of the model. */
function symmetryScatter(cell, layer, head) {
  const { x: across, y: up } = REPORT.shown.scatter;
  const lacking = [across, up].find((name) => !column(cell, name));
  if (lacking) return h("figure", {}, h("h3", {}, PANELS.symmetry), missing(whyMissing(cell, lacking, layer)));
  const size = { width: 340, height: 262, left: 46, right: 14, bottom: 42 };
  const plot = axes({ ...size, x: { domain: bounds(across), title: AXES.symmetry }, y: { domain: bounds(up), title: AXES.share } });
  const marks = claimed(cell);
  const all = everyHead(cell).map(([l, k]) => ({ l, k, x: value(cell, across, l, k), y: value(cell, up, l, k) })).filter((point) => isNumber(point.x) && isNumber(point.y));
  const own = all.find((point) => point.l === layer && point.k === head);
  const ink = accent();
  const drawn = svg(size.width, size.height, `QK symmetry against positional share of ${all.length} heads${own ? `; head ${layer}.${head}: symmetry ${number(own.x)}, share ${number(own.y)}` : ""}`,
    plot.group,
    s("line", { class: "reference", x1: plot.atX(0), x2: plot.atX(0), y1: plot.top, y2: plot.bottom }),
    all.map((point) => s("a", { href: headLink(cell, `${point.l}.${point.k}`), tabindex: -1, "aria-label": `head ${point.l}.${point.k}` },
      tip(s("circle", { class: "focus", cx: plot.atX(point.x), cy: plot.atY(point.y), r: 3.6, fill: marks.has(`${point.l}.${point.k}`) ? ink : css("--muted"), "fill-opacity": 0.5 }),
        `${point.l}.${point.k}\nsymmetry ${number(point.x)}, positional share ${number(point.y)}`))),
    own ? [s("circle", { cx: plot.atX(own.x), cy: plot.atY(own.y), r: 7, fill: ink, class: "halo" }),
      s("text", { class: "strong halo", x: plot.atX(own.x) + (own.x > 0.5 ? -11 : 11), y: plot.atY(own.y) + 4, "text-anchor": own.x > 0.5 ? "end" : "start" }, `${layer}.${head}`)] : null);
  return figure({
    title: PANELS.symmetry,
    drawing: drawn,
    caption: `Symmetry is often read as position. It does not tell position from content: the other axis measures the share of the score's variance over keys that comes from their positions.${marks.size ? " Blue: claimed heads." : ""}`,
    name: `symmetry-${cell.model}-${layer}.${head}`,
    table: () => [["layer.head", "QK symmetry", "positional share"], all.map((point) => [`${point.l}.${point.k}`, point.x, point.y])],
  });
}

const SHARES = REPORT.shown.shares;

/** The shares of the score's variance as one bar of parts. */
function shareBar(cell, layer, head) {
  const kind = SHARES.learned.some((part) => column(cell, part.metric)) ? "learned" : SHARES.rotary.some((part) => column(cell, part.metric)) ? "rotary" : null;
  if (!kind) return h("figure", {}, h("h3", {}, PANELS.shares), missing(whyMissing(cell, REPORT.shown.scatter.y, layer)));
  const parts = SHARES[kind].map((part) => ({ ...part, share: value(cell, part.metric, layer, head) })).filter((part) => isNumber(part.share));
  if (!parts.length) return h("figure", {}, h("h3", {}, PANELS.shares), missing(whyMissing(cell, SHARES[kind][0].metric, layer)));
  const colours = { position: [0.98, 0.84, 0.72], content: [0.05, 0.17, 0.28], both: [0.5] };
  const [width, line, left, right] = [340, 22, 112, 292];
  const groups = unique(parts.map((part) => part.group)).map((name) => [name, parts.filter((part) => part.group === name)]);
  const x = linear([0, 1], [left, right]);
  const titles = REPORT.wording.parts;
  let y = 2;
  const drawing = groups.flatMap(([name, own]) => {
    const drawn = [s("text", { class: "strong", x: 0, y: y + 14 }, titles[name]), s("text", { class: "strong", x: right + 8, y: y + 14 }, percent(own.reduce((sum, part) => sum + part.share, 0)))];
    y += 20;
    own.forEach((part, place) => {
      const fill = name === "both" ? css("--muted") : between(shade(REPORT.palette.diverging), colours[name][place]);
      drawn.push(s("text", { class: "soft", x: left - 8, y: y + 14, "text-anchor": "end" }, part.name),
        s("rect", { x: left, y: y + 3, width: right - left, height: line - 8, fill: css("--faint"), rx: 2 }),
        s("rect", { x: left, y: y + 3, width: Math.max(1, x(part.share) - left), height: line - 8, fill, rx: 2 }),
        s("text", { class: "soft", x: right + 8, y: y + 14 }, percent(part.share)));
      y += line;
    });
    y += 10;
    return drawn;
  });
  const drawn = svg(width, y, `Shares of the QK score's variance of head ${layer}.${head}: ${parts.map((part) => `${titles[part.group]}, ${part.name} ${percent(part.share)}`).join("; ")}`, drawing);
  const form = kind === "learned" ? "Split by the part of the key that the score varies with, and by the part of the query that meets it (learned positions)." : "Split by offset, by key token, and by both together (rotary positions).";
  return figure({
    title: PANELS.shares,
    drawing: drawn,
    caption: `${form} The direct path alone: what earlier heads move into the stream is not in it.`,
    name: `shares-${cell.model}-${layer}.${head}`,
    table: () => [["share of", "value"], parts.map((part) => [`${part.group}: ${part.name}`, part.share])],
  });
}

function offsetPlot(cell, layer, head) {
  const empty = (reason) => h("figure", {}, h("h3", {}, PANELS.offsets), missing(reason));
  if (!cell.offsets) return empty(whyMissing(cell, REPORT.shown.offsets, layer));
  const scores = REPORT.pool[cell.offsets.heads[layer * cell.heads + head]];
  if (!scores.length) return empty("not on this page: see offsets.parquet");
  const at = [cell.offsets.at.dense, cell.offsets.at.sparse].find((places) => places.length === scores.length);
  const points = at.map((offset, k) => [offset, scores[k]]).filter(([, y]) => isNumber(y));
  if (!points.length) return empty("it has no value for this head");
  const far = at[at.length - 1];
  const stretched = far > REPORT.limits.stretched;
  const place = (x) => (stretched ? Math.log10(1 + x) : x);
  const [low, high] = [Math.min(...points.map(([, y]) => y)), Math.max(...points.map(([, y]) => y))];
  const pad = (high - low || Math.abs(high) || 1) * 0.08;
  const size = { width: 340, height: 262, left: 54, right: 14, bottom: 42 };
  const marks = stretched ? REPORT.limits.offsets.filter((x) => x <= far) : ticks(0, far, 5);
  const plot = axes({ ...size, x: { domain: [0, place(far)], ticks: marks.map(place), text: (x) => tickText(stretched ? Math.round(10 ** x - 1) : x), title: `${AXES.offset}${stretched ? " (log)" : ""}` }, y: { domain: [low - pad, high + pad], title: AXES.score } });
  const spots = points.map(([x, y]) => [plot.atX(place(x)), plot.atY(y)]);
  const ink = accent();
  const previous = points.findIndex(([x]) => x === 1);
  const drawn = svg(size.width, size.height, `Mean score by offset of head ${layer}.${head}, from ${number(points[0][1], 3)} at offset 0 to ${number(points[points.length - 1][1], 3)} at ${far}`,
    plot.group,
    s("path", { d: path(spots), fill: "none", stroke: ink, "stroke-width": 1.8 }),
    spots.map(([x, y], k) => tip(s("circle", { cx: x, cy: y, r: points.length > 60 ? 1.8 : 2.8, fill: ink }), `offset ${points[k][0]}: ${number(points[k][1], 3)}`)),
    previous >= 0 ? s("circle", { cx: spots[previous][0], cy: spots[previous][1], r: 5.5, fill: "none", stroke: css("--warn"), "stroke-width": 2 }) : null);
  const auc = value(cell, REPORT.shown.offsets, layer, head);
  return figure({
    title: PANELS.offsets,
    drawing: drawn,
    caption: `The positional part of the score, before the attention scale.${previous >= 0 ? " Ring: the previous token." : ""}${isNumber(auc) ? ` ${metricTitle(REPORT.shown.offsets)} ${number(auc)} (${tickText(REPORT.metrics[REPORT.shown.offsets].chance)} by chance).` : ""}${points.length < cell.offsets.of ? ` ${points.length} of ${cell.offsets.of} offsets.` : ""}`,
    name: `offsets-${cell.model}-${layer}.${head}`,
    table: () => [["offset", "mean score"], points.map(([x, y]) => [String(x), y])],
  });
}

// --- composition ------------------------------------------------------------------------------------------

const SHOWN_PARTNERS = REPORT.limits.partners;

/** The strongest partners of a head, as a reader of others and as one that is read. */
function partnerPanels(cell, layer, head) {
  const source = siblings(cell).find((other) => other.composition && other.analysis === "composition") || having(cell, "composition");
  if (!source) return [missing("no composition was computed for these weights: run analysis=composition")];
  const all = rows(source, "composition");
  const other = { sender: "receiver", receiver: "sender" };
  const sides = Object.entries(REPORT.wording.sides).map(([key, title]) => ({ key, title, mine: (row) => row[`${other[key]}_layer`] === layer && row[`${other[key]}_head`] === head }));
  const panels = sides.flatMap((side) => {
    const found = all.filter(side.mine);
    return found.length ? [partnerPlot(cell, layer, head, side, found)] : [];
  });
  const partial = source.analysis !== "composition";
  const note = `Norm of the product of the two heads' matrices over the product of their norms (Elhage et al. 2021); the line marks independent random weights. ${partial ? "Only the pairs that the claims name were computed; analysis=composition computes all." : source === cell ? "" : `From the cell ${source.task} / ${source.analysis} of the same weights.`}`;
  if (!panels.length) return [h("p", { class: "missing" }, partial ? "No claimed pair has this head: analysis=composition computes all pairs." : "None of the strongest pairs has this head.")];
  return [h("p", { class: "note" }, note), h("div", { class: "grid2" }, panels), ...componentsRead(cell, all.filter(sides[0].mine))];
}

/** Which component of each of its strongest senders a head reads, with the tokens that the component reads and writes. */
function componentsRead(cell, found) {
  const listed = having(cell, "directions");
  const folded = cell.provenance.processing.requested === "folded"; // components are counted as in directions.parquet
  const could = folded && (listed || !cell.unavailable[RATIOS.ov.vocab]);
  const lines = ["q", "k", "v"].flatMap((mode) => found.filter((row) => row.mode === mode && isNumber(row.component)).sort((a, b) => b.score - a.score).slice(0, REPORT.limits.senders));
  if (!lines.length) return [];
  const tokens = (list) => h("div", { class: "tokens" }, (list || []).slice(0, SHOWN_TOKENS).map((place) => token(REPORT.tokens[place])));
  const line = (row) => {
    const sender = `${row.sender_layer}.${row.sender_head}`;
    const heads = listed && folded ? REPORT.pool[listed.directions.heads[row.sender_layer * cell.heads + row.sender_head]] : [];
    const own = heads.find((part) => part.circuit === "ov" && part.kind === "singular" && part.component === row.component);
    const lists = own ? ["read", "write"].map((side) => h("td", {}, tokens((own[side] || {}).plus), h("div", { class: "note" }, "or"), tokens((own[side] || {}).minus)))
      : [h("td", { class: "missing small", colspan: 2 }, could ? `not listed: analysis.components=${row.component + 1} lists it` : "no tokens are listed for these weights")];
    return h("tr", {}, h("td", {}, REPORT.wording.modes[row.mode]), h("td", {}, h("a", { href: headLink(cell, sender) }, sender)), h("td", { class: "number" }, row.component), h("td", { class: "number" }, number(row.component_score, 3)), ...lists);
  };
  return [h("h3", {}, "Which component of its senders it reads"),
    h("p", { class: "note" }, `The singular component of the sender's OV that this head reads most, counted from 0 as above, with the norm of what this head reads of it over that of all that it can read (random weights: ${number(lines[0].score - lines[0].score_above_random, 3)}); descriptive, and no verdict rests on it (Merullo et al. 2024). Its tokens: what the sender reads, and what it writes for this head to read; both lists of a row may change sign together.`),
    h("div", { class: "scroll" }, h("table", { class: "components", id: "components-read" },
      h("thead", {}, h("tr", {}, [["by its"], ["sender"], ["component", "number"], ["score", "number"], ["the sender reads"], ["→ writes"]].map(([title, kind]) => h("th", { scope: "col", class: kind || null }, title)))),
      h("tbody", {}, lines.map(line))))];
}

function partnerPlot(cell, layer, head, side, found) {
  const line = 19;
  const [width, left, right] = [440, 62, 390];
  const groups = ["q", "k", "v"].map((mode) => [mode, found.filter((row) => row.mode === mode).sort((a, b) => b.score - a.score).slice(0, SHOWN_PARTNERS)]).filter(([, list]) => list.length);
  const most = Math.max(...groups.flatMap(([, list]) => list.map((row) => row.score)));
  const random = found[0].score - found[0].score_above_random;
  const x = linear([0, Math.max(most, random) * 1.02], [left, right]);
  let y = 16;
  const drawn = groups.flatMap(([mode, list]) => {
    const fill = shade(REPORT.palette.modes[mode]);
    const start = y;
    const part = [s("text", { class: "strong", x: 0, y: y + 4, style: `fill:${fill}` }, REPORT.wording.modes[mode])];
    const values = [];
    y += 10;
    list.forEach((row) => {
      const label = `${row[`${side.key}_layer`]}.${row[`${side.key}_head`]}`;
      const more = isNumber(row.matching) && mode === "k" ? `\nmatching through it: ${number(row.matching)}` : "";
      part.push(s("a", { href: headLink(cell, label), "aria-label": `${label}: ${number(row.score, 3)}` }, tip(s("g", {},
        s("text", { x: left - 8, y: y + 13, "text-anchor": "end" }, label),
        s("rect", { class: "focus", x: left, y: y + 3, width: Math.max(1, x(row.score) - left), height: line - 6, rx: 2, fill, "fill-opacity": 0.75 })),
      `${label}: ${number(row.score, 3)}, ${number(row.score_above_random, 3)} above random\n${percent(row.percentile)} of the sender's layer score no more${more}`)));
      values.push(s("text", { class: "halo", x: x(row.score) + 6, y: y + 13 }, number(row.score, 3)));
      y += line;
    });
    part.push(s("line", { class: "reference", x1: x(random), x2: x(random), y1: start + 10, y2: y }), values);
    y += 20;
    return part;
  });
  drawn.push(s("text", { class: "tick", x: x(random), y: y - 6, "text-anchor": "middle" }, `random ${number(random, 3)}`));
  return figure({
    title: side.title,
    drawing: svg(width, y + 2, `${side.title}: strongest compositions of head ${layer}.${head}`, drawn),
    name: `composition-${cell.model}-${layer}.${head}-${side.key}`,
    table: () => [["mode", side.key, "score", "above random", "percentile"], [...found].sort((a, b) => b.score - a.score).map((row) => [row.mode, `${row[`${side.key}_layer`]}.${row[`${side.key}_head`]}`, row.score, row.score_above_random, row.percentile])],
  });
}

// --- nulls ------------------------------------------------------------------------------------------------

const STRIP = { width: 760, left: 214, right: 500, line: 25 };

/** Every test of a head or a role: the null's quantiles with the value on them. */
function nullStrips(tests, name) {
  const groups = new Map();
  for (const row of tests) {
    const key = `${row.metric} ${row.unit}`;
    groups.set(key, { metric: row.metric, unit: row.unit, first: row, rows: [...(groups.get(key)?.rows || []), row] });
  }
  const metrics = unique(tests.map((row) => row.metric));
  return metrics.map((metric) => {
    const parts = [...groups.values()].filter((group) => group.metric === metric);
    const first = parts[0].first;
    const kind = first.primary ? "primary" : first.exploratory ? "exploratory: reported, never decides" : "secondary";
    const own = parts.find((part) => part.unit === "value");
    const alone = first.of_role && first.layer !== null && !name.startsWith("head ") ? `, tested as its one head ${headLabel(first)}` : "";
    return h("div", { style: "margin:14px 0 22px" },
      h("h3", {}, `${predictedTitle(metric, first.prediction)} `, h("span", { class: "muted", style: "font-weight:400" }, `predicted ${first.prediction}, ${kind}${alone}${own ? `; value ${number(own.first.value, 3)}` : ""}`)),
      figure({
        drawing: h("div", {}, parts.map((part) => stripPlot(part, name))),
        table: () => [["null", "value", "5 %", "median", "95 %", "p", "q", "counts"], parts.flatMap((part) => part.rows.map((row) => [row.null, row.value,
          ...[0.05, 0.5, 0.95].map((q) => (row.quantiles.length ? quantile(row, q) : null)), row.p, row.q, row.counts ? "yes" : "no"]))],
      }));
  });
}

function stripPlot({ metric, unit, rows: tests }, name) {
  const { width, left, right, line } = STRIP;
  const bounds = [tests[0].low, tests[0].high];
  const x = linear(bounds, [left, right]);
  const height = tests.length * line + 24;
  const inside = (at) => Math.min(right, Math.max(left, x(at)));
  const title = REPORT.wording.units[unit];
  return svg(width, height, `${name}, ${metricTitle(metric)}: ${tests.map((row) => `${nullName(row.null)} p ${probability(row.p)}`).join("; ")}`,
    ticks(...bounds, 4).map((tick) => [
      s("line", { class: "gridline", x1: x(tick), x2: x(tick), y1: 0, y2: tests.length * line }),
      s("text", { class: "tick", x: x(tick), y: tests.length * line + 14, "text-anchor": "middle" }, unit === "percentile" ? percent(tick) : tickText(tick)),
    ]),
    title ? s("text", { class: "tick", x: left - 20, y: tests.length * line + 14, "text-anchor": "end" }, title) : null,
    tests.map((row, k) => {
      const y = k * line + line / 2;
      const found = unit === "percentile" ? row.percentile : row.value;
      const held = isNumber(row.q) && row.q < 0.05;
      const decided = row.counts && row.testable;
      const fill = held ? shade(REPORT.palette.verdicts.corroborated) : css("--ink");
      const band = unit !== "percentile" && row.quantiles.length ? row : null;
      const why = !row.testable ? REPORT.wording.cannot : row.counts ? "" : REPORT.wording.reported;
      return [
        s("text", { x: left - 10, y: y + 4, "text-anchor": "end", class: decided ? null : "soft" }, nullName(row.null)),
        band ? s("line", { x1: inside(quantile(band, 0)), x2: inside(quantile(band, 1)), y1: y, y2: y, stroke: css("--line"), "stroke-width": 1.5 }) : null,
        band ? s("rect", { x: inside(quantile(band, 0.05)), width: Math.max(2, inside(quantile(band, 0.95)) - inside(quantile(band, 0.05))), y: y - 5, height: 10, rx: 2, fill: shade(REPORT.palette.band) }) : null,
        band ? s("line", { x1: inside(quantile(band, 0.5)), x2: inside(quantile(band, 0.5)), y1: y - 5, y2: y + 5, stroke: css("--muted"), "stroke-width": 1.5 }) : null,
        unit === "percentile" ? s("line", { x1: left, x2: right, y1: y, y2: y, stroke: css("--line"), "stroke-width": 1.5 }) : null,
        isNumber(found) ? tip(s("circle", { cx: inside(found), cy: y, r: 5.5, fill: decided ? fill : css("--ground"), stroke: fill, "stroke-width": 1.8 }),
          `${number(found, 3)}; ${percent(row.percentile)} of the null lies no higher\np ${probability(row.p)}, ${plural(row.n_others, row.null === "spectrum" || row.null.startsWith("token") ? "draw" : "other head")}`) : null,
        s("text", { x: right + 14, y: y + 4 }, `p ${probability(row.p)}`),
        isNumber(row.q) ? s("text", { x: right + 76, y: y + 4, class: held ? "strong" : null }, `q ${probability(row.q)}`) : null,
        why ? s("text", { class: "tick", x: right + (isNumber(row.q) ? 138 : 76), y: y + 4 }, why) : null,
      ];
    }));
}
