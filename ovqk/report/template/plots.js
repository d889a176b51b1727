// Colours, scales, axes, and the frame that every figure stands in.

// --- colours ----------------------------------------------------------------------------------------------

const isDark = () => document.documentElement.hasAttribute("data-dark");
const shade = (pair) => pair[isDark() ? 1 : 0];
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function rgb(colour) {
  return [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
}

function between(colours, place) {
  const at = place * (colours.length - 1);
  const left = Math.min(Math.floor(at), colours.length - 2);
  const [a, b] = [rgb(colours[left]), rgb(colours[left + 1])];
  return "#" + a.map((x, k) => Math.round(x + (b[k] - x) * (at - left)).toString(16).padStart(2, "0")).join("");
}

function stops(scale) {
  return shade(REPORT.palette[scale.kind === "sequential" ? "sequential" : "diverging"]);
}

/** Where a value lies on a scale, in [0, 1]. */
function position(scale, x) {
  const place = scale.kind === "ratio"
    ? (x > 0 ? Math.log(x / scale.low) / Math.log(scale.high / scale.low) : 0)
    : (x - scale.low) / (scale.high - scale.low);
  return Math.min(1, Math.max(0, place));
}

function colour(scale, x) {
  return isNumber(x) ? between(stops(scale), position(scale, x)) : shade(REPORT.palette.missing);
}

/** Black or white, whichever is easier to read on a colour (relative luminance, WCAG 2). */
function inkOn(background) {
  const linear = rgb(background).map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] < 0.179 ? "#ffffff" : "#15171a";
}

/** The colour of what a page is about, such as its head. */
const accent = () => shade(REPORT.palette.categories)[0];

// --- scales and axes --------------------------------------------------------------------------------------

function linear([a, b], [p, q]) {
  return (x) => p + ((x - a) / (b - a || 1)) * (q - p);
}

function ticks(low, high, count = 5) {
  const step = niceStep((high - low) / count);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k += 1) found.push(Number((k * step).toPrecision(12)));
  return found;
}

function niceStep(rough) {
  const unit = 10 ** Math.floor(Math.log10(rough || 1));
  return unit * [1, 2, 2.5, 5, 10].find((nice) => nice * unit >= rough * (1 - 1e-9));
}

function tickText(x) {
  const size = Math.abs(x);
  return minus(size >= 1000 ? x.toLocaleString("en") : String(Number(x.toPrecision(3))));
}

/** An SVG of so many pixels, with a sentence that says what it shows. */
function svg(width, height, label, ...children) {
  return s("svg", { class: "plot", viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label, style: leastWidth(width) }, children);
}

/** A wide plot keeps its texts readable on a narrow screen, where its frame scrolls. */
function leastWidth(width) {
  return width > 380 ? `min-width:${Math.min(width, 620)}px` : null;
}

/** The axes of a plot: gridlines across, ticks, titles. Returns their group and the two scales. */
function axes({ width, height, x, y, left = 44, right = 12, top = 12, bottom = 40 }) {
  left += y.title ? 12 : 0;
  const atX = linear(x.domain, [left, width - right]);
  const atY = linear(y.domain, [height - bottom, top]);
  const group = s("g", { "aria-hidden": "true" });
  for (const tick of y.ticks || ticks(...y.domain, 4)) {
    group.append(s("line", { class: "gridline", x1: left, x2: width - right, y1: atY(tick), y2: atY(tick) }),
      s("text", { class: "tick", x: left - 7, y: atY(tick) + 4, "text-anchor": "end" }, (y.text || tickText)(tick)));
  }
  group.append(s("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
  for (const tick of x.ticks || ticks(...x.domain, 5)) {
    group.append(s("line", { class: "axis", x1: atX(tick), x2: atX(tick), y1: height - bottom, y2: height - bottom + 4 }),
      s("text", { class: "tick", x: atX(tick), y: height - bottom + 17, "text-anchor": "middle" }, (x.text || tickText)(tick)));
  }
  if (x.title) group.append(s("text", { class: "soft", x: (left + width - right) / 2, y: height - 5, "text-anchor": "middle" }, x.title));
  if (y.title) group.append(s("text", { class: "soft", x: 0, y: 0, "text-anchor": "middle", transform: `translate(11 ${(top + height - bottom) / 2}) rotate(-90)` }, y.title));
  return { group, atX, atY, left, right: width - right, top, bottom: height - bottom };
}

function path(points) {
  return points.map(([x, y], k) => `${k ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
}

/** Many dots as one element, so that a thousand heads cost no more than one. */
function specks(points, radius, stroke, opacity) {
  const d = points.map(([x, y]) => `M${x.toFixed(1)} ${y.toFixed(1)}h0`).join("");
  return s("path", { d, fill: "none", stroke, "stroke-width": 2 * radius, "stroke-linecap": "round", "stroke-opacity": opacity });
}

/** An SVG that Python drew. It is a picture of numbers: no text of a record is in it. */
function drawn(text, label) {
  const node = document.importNode(new DOMParser().parseFromString(text, "image/svg+xml").documentElement, true);
  node.setAttribute("aria-label", label);
  return node;
}

/** Text that a pointer or the keyboard brings up. */
function tip(node, text) {
  node.setAttribute("data-tip", text);
  return node;
}

/** The legend of a colour scale. */
function colourBar(scale, title) {
  const width = 260;
  const id = `bar-${colourBar.count = (colourBar.count || 0) + 1}`;
  const colours = stops(scale);
  const values = scale.kind === "ratio"
    ? [scale.low, Math.sqrt(scale.low * scale.centre), scale.centre, Math.sqrt(scale.centre * scale.high), scale.high]
    : [scale.low, (scale.low + scale.centre) / 2, scale.centre, (scale.centre + scale.high) / 2, scale.high];
  return svg(width + 44, 46, `${title}: colours from ${number(scale.low)} to ${number(scale.high)}`,
    s("defs", {}, s("linearGradient", { id }, colours.map((stop, k) => s("stop", { offset: k / (colours.length - 1), "stop-color": stop })))),
    s("rect", { x: 22, y: 6, width, height: 12, fill: `url(#${id})`, rx: 2 }),
    values.map((x, k) => [
      s("line", { class: "axis", x1: 22 + (width * k) / 4, x2: 22 + (width * k) / 4, y1: 18, y2: 22 }),
      s("text", { class: "tick", x: 22 + (width * k) / 4, y: 35, "text-anchor": "middle" },
        scale.kind === "ratio" ? ratioText(x / scale.centre, k) : tickText(Number(x.toPrecision(3)))),
    ]));
}

function ratioText(x, place) {
  const text = x < 1 ? `1/${tickText(1 / x)}` : tickText(x);
  return { 0: `≤ ${text}`, 2: "chance", 4: `≥ ${text}` }[place] || text;
}

// --- the frame of a figure --------------------------------------------------------------------------------

/** A figure with its title, caption, what it shows as a table, and itself as a file. */
function figure({ title, caption, drawing, table, name }) {
  const node = h("figure", {}, title ? h("h3", {}, title) : null, h("div", { class: "scroll" }, drawing),
    caption ? h("figcaption", {}, caption) : null);
  const plots = () => [...node.querySelectorAll("svg.plot")];
  const tools = h("div", { class: "tools" });
  if (name && plots().length === 1) {
    tools.append(h("button", { type: "button", onclick: () => download(plots()[0], name, "svg") }, "SVG"),
      h("button", { type: "button", onclick: () => download(plots()[0], name, "png") }, "PNG"));
  }
  if (table) {
    const details = h("details", {}, h("summary", {}, "as a table"));
    details.addEventListener("toggle", () => {
      if (details.open && details.children.length === 1) details.append(h("div", { class: "scroll", tabindex: 0 }, dataTable(...table())));
    });
    tools.append(details);
  }
  if (tools.children.length) node.append(tools);
  return node;
}

const KEPT = ["fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-linejoin", "stroke-linecap", "paint-order", "opacity",
  "fill-opacity", "stroke-opacity", "visibility", "font-size", "font-family", "font-weight", "font-style", "text-anchor"];

/** Save a plot as it looks now: its styles written into it. */
function download(plot, name, kind) {
  const copy = plot.cloneNode(true);
  const [from, to] = [[...plot.querySelectorAll("*")], [...copy.querySelectorAll("*")]];
  from.forEach((node, k) => {
    const style = getComputedStyle(node);
    KEPT.forEach((key) => to[k].setAttribute(key, style.getPropertyValue(key)));
    for (const attribute of ["class", "style", "tabindex", "data-tip", "href"]) to[k].removeAttribute(attribute);
  });
  const [, , width, height] = plot.getAttribute("viewBox").split(" ").map(Number);
  copy.setAttribute("xmlns", SVG_NAMESPACE);
  copy.prepend(s("rect", { width, height, fill: css("--ground") }));
  const source = URL.createObjectURL(new Blob([new XMLSerializer().serializeToString(copy)], { type: "image/svg+xml" }));
  if (kind === "svg") return save(source, `${name}.svg`);
  const image = new Image();
  image.onload = () => {
    const canvas = h("canvas", { width: 3 * width, height: 3 * height });
    canvas.getContext("2d").drawImage(image, 0, 0, 3 * width, 3 * height);
    canvas.toBlob((blob) => save(URL.createObjectURL(blob), `${name}.png`));
    URL.revokeObjectURL(source);
  };
  image.src = source;
  return undefined;
}

function save(source, name) {
  h("a", { href: source, download: name.replace(/[^\w.~-]+/g, "-") }).click();
  setTimeout(() => URL.revokeObjectURL(source), 1000);
}
