// Provenance: where the numbers come from, and which are missing.

const NOT_APPLICABLE = "not applicable: ";

function provenancePage() {
  return [
    h("h1", { tabindex: -1 }, "Provenance"),
    h("p", { class: "lead" }, "The source of every number on this page, the parts left out, and links to the full tables."),
    ...failed(),
    h("h2", {}, "Cells"),
    h("div", { class: "scroll" }, cellTable()),
    h("h2", {}, "Unavailable, and why"),
    ...unavailable(),
    h("h2", {}, "Each cell"),
    ...CELLS.map(cellDetails),
    h("h2", {}, "On this page"),
    h("p", {}, pageDetail(), REPORT.figures ? [" Figures as SVG and PNG files: ", h("a", { href: `${REPORT.figures}/` }, `${REPORT.figures}/`), "."] : null),
  ];
}

function failed() {
  if (!REPORT.failures.length) return [];
  return [h("h2", {}, "Without results"), h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, ["model", "task", "analysis", "what happened"].map((title) => h("th", { scope: "col" }, title)))),
    h("tbody", {}, REPORT.failures.map((row) => h("tr", {}, h("td", {}, row.model), h("td", {}, row.task), h("td", {}, row.analysis), h("td", { class: "small" }, row.error))))))];
}

function cellTable() {
  const titles = ["model", "task", "analysis", "weights", "seed", "draws", "revision or digest", "seconds", "peak memory", "files"];
  return h("table", { id: "cells" }, h("thead", {}, h("tr", {}, titles.map((title, k) => h("th", { scope: "col", class: [4, 5, 7, 8].includes(k) ? "number" : null }, title)))),
    h("tbody", {}, CELLS.map((cell) => h("tr", {}, h("td", {}, cell.model), h("td", {}, cell.task), h("td", {}, cell.analysis), h("td", {}, processing(cell)),
      h("td", { class: "number" }, cell.seed), h("td", { class: "number" }, cell.provenance.draws ?? ""),
      h("td", { class: "path small" }, (cell.provenance.revision || cell.provenance.weights_digest || "").slice(0, 12)),
      h("td", { class: "number" }, isNumber(cell.provenance.wall_seconds) ? fixed(cell.provenance.wall_seconds, 1) : ""),
      h("td", { class: "number" }, isNumber(cell.provenance.peak_memory_mb) ? `${fixed(cell.provenance.peak_memory_mb, 0)} MB` : ""),
      h("td", { class: "small" }, h("a", { href: `${cell.folder}/record.json` }, "record"))))));
}

function processing(cell) {
  const { requested, applied } = cell.provenance.processing;
  return requested === applied ? applied : `${applied} (asked for: ${requested})`;
}

/** Reason -> metrics -> the cells it holds for; what does not apply to a kind of model or task apart. */
function unavailable() {
  const reasons = new Map();
  for (const cell of CELLS) {
    const own = new Map();
    for (const [metric, reason] of Object.entries(cell.unavailable)) own.set(reason, [...(own.get(reason) || []), metric]);
    for (const [reason, unsorted] of own) {
      const metrics = Object.keys(REPORT.metrics).filter((name) => unsorted.includes(name)).concat(unsorted.filter((name) => !REPORT.metrics[name]));
      const key = `${reason}\n${metrics.join(" ")}`;
      reasons.set(key, { reason, metrics, cells: [...(reasons.get(key)?.cells || []), cellTitle(cell)] });
    }
  }
  const all = [...reasons.values()];
  const table = (list) => h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, ["reason", "metrics", "cells"].map((title) => h("th", { scope: "col" }, title)))),
    h("tbody", {}, list.map((row) => h("tr", { style: "vertical-align:top" }, h("td", {}, row.reason.replace(NOT_APPLICABLE, "")), h("td", { class: "small path" }, row.metrics.join(", ")), h("td", { class: "small" }, row.cells.join(", ")))))));
  const [apart, lacking] = [all.filter((row) => row.reason.startsWith(NOT_APPLICABLE)), all.filter((row) => !row.reason.startsWith(NOT_APPLICABLE))];
  return [
    lacking.length ? table(lacking) : h("p", {}, "No metric that applies is unavailable."),
    apart.length ? h("details", {}, h("summary", {}, `${plural(apart.length, "reason")} from the kind of model or task`), table(apart)) : null,
  ];
}

function cellDetails(cell) {
  const { provenance } = cell;
  const node = h("details", { class: "cell" }, h("summary", {}, cellTitle(cell)));
  node.addEventListener("toggle", () => {
    if (!node.open || node.children.length > 1) return;
    const words = provenance.words || {};
    const kept = Object.entries(words.kept || {}).map(([set, n]) => `${set}: ${n}`).join(", ");
    const dropped = Object.entries(words.dropped || {}).filter(([, list]) => list.length);
    const versions = Object.entries(provenance.versions || {}).map(([name, version]) => `${name} ${version}`).join(", ");
    const claims = cell.claims || {};
    const links = [["record.json", null], ["cell.yaml", null], ...Object.entries(cell.tables).map(([name, n]) => [`${name}.parquet`, n])];
    node.append(facts([
      ["Cell", h("code", {}, cell.cell_id)],
      ["Claims", claims.source ? `${claims.source} (${claims.reliability})${claims.note ? ` – ${claims.note}` : ""}` : claims.none],
      ["Weights", `${processing(cell)}, read by ${cell.loaded_by}, digest ${provenance.weights_digest}${provenance.revision ? `, revision ${provenance.revision}` : ""}`],
      ["Seed and draws", `seed ${cell.seed}${isNumber(provenance.draws) ? `, ${provenance.draws} draws of a null` : ""}`],
      ["Computed on", computedOn(provenance)],
      ["Sweep", cell.sweep],
      ["Words kept", kept],
      ["Words left out", dropped.length ? h("span", {}, dropped.map(([set, list], k) => [k ? "; " : "", `${set}: `, list.map((word) => [tip(token(word), ((words.reasons || {})[set] || {})[word] || ""), " "])])) : null],
      ["Notes", (cell.notes || []).length ? h("ul", { class: "plain" }, cell.notes.map((note) => h("li", {}, note))) : null],
      ["Code", provenance.git_commit ? `${provenance.git_commit.slice(0, 12)}${provenance.git_dirty ? ", with uncommitted changes" : ""}` : null],
      ["Versions", versions],
      ["Files", h("span", {}, links.map(([name, n], k) => [k ? ", " : "", h("a", { href: `${cell.folder}/${name}` }, name), n === null ? "" : ` (${n.toLocaleString("en")})`]))],
    ]));
  });
  return node;
}

/** The device and the threads; null in records of versions that do not name the device. */
function computedOn({ device, threads, peak_gpu_memory_mb: gpu }) {
  if (!device) return null;
  return `${device}${isNumber(gpu) ? `, at most ${fixed(gpu, 0)} MB of its memory` : ""}, with ${plural(threads, "processor thread")}`;
}

function pageDetail() {
  const { values, tokens, partners, offsets } = REPORT.detail;
  if (values === null) return "Metrics, spectra, tokens and compositions of every head are on this page, at four digits; token scores, and all digits, are in the tables linked above.";
  if (values === 0) return "This page holds everything about the heads that are claimed or candidates, at four digits. To keep it small, it holds only the metrics of the other heads; the rest is in the tables linked above.";
  const less = [`${values} leading eigen- and singular values`, `${tokens} tokens of each side of singular components`, `${offsets} offsets`, `the ${partners} strongest compositions of each kind`];
  return `This page holds everything about the heads that are claimed or candidates, at four digits. To keep it small, it holds for the other heads all metrics and ${sentenceList(less)}; the rest is in the tables linked above.`;
}
