// Routes (#compare, #prompts/MODEL/TASK, #atlas/TASK/METRIC, #head/MODEL/TASK/LAYER.HEAD, #circuit/MODEL/TASK, #provenance), theme and tips.

const SECTIONS = [["compare", "Compare"], ...(RAN.length ? [["prompts", PROMPTS]] : []), ["atlas", "Head atlas"], ["head", "Head"], ["circuit", "Circuit"], ["provenance", "Provenance"]];
const main = document.getElementById("main");

function route() {
  const parts = location.hash.replace(/^#/, "").split("/");
  return { section: SECTIONS.some(([key]) => key === parts[0]) ? parts[0] : "compare", parts: parts.slice(1) };
}

/** A part of the address as text; unchanged if it is no proper encoding. */
function decoded(part) {
  try {
    return part === undefined ? undefined : decodeURIComponent(part);
  } catch {
    return part;
  }
}

function content({ section, parts }) {
  if (!CELLS.length) return [h("h1", { tabindex: -1 }, "No finished cell"), ...failed()];
  switch (section) {
    case "prompts": return promptsPage(parts.slice(0, 2).join("/"));
    case "atlas": return atlasPage(decoded(parts[0]), parts[1]);
    case "head": return headPage(parts.slice(0, 2).join("/"), parts[2]);
    case "circuit": return circuitPage(parts.slice(0, 2).join("/"));
    case "provenance": return provenancePage();
    default: return comparePage();
  }
}

function show(focus) {
  const at = route();
  hideTip();
  main.dataset.address = location.hash;
  main.replaceChildren(...content(at).flat(Infinity).filter(Boolean));
  document.getElementById("nav").replaceChildren(...SECTIONS.map(([key, title]) =>
    h("a", { href: `#${key}`, "aria-current": key === at.section ? "page" : null }, title)));
  const title = main.querySelector("h1");
  document.title = title ? `${title.textContent} – ovqk` : "ovqk report";
  if (focus) {
    window.scrollTo(0, 0);
    if (title) title.focus({ preventScroll: true });
  }
}

// --- theme ------------------------------------------------------------------------------------------------

const THEMES = ["auto", "light", "dark"];
const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
const printing = window.matchMedia("print");
let theme = "auto";
try {
  theme = THEMES.includes(localStorage.getItem("ovqk-theme")) ? localStorage.getItem("ovqk-theme") : "auto";
} catch { /* a page without storage keeps its theme until it is closed */ }

function applyTheme() {
  const dark = !printing.matches && (theme === "dark" || (theme === "auto" && prefersDark.matches));
  const before = isDark();
  document.documentElement.toggleAttribute("data-dark", dark);
  document.documentElement.dataset.theme = theme;
  const button = document.getElementById("theme");
  button.textContent = { auto: "Theme: auto", light: "Theme: light", dark: "Theme: dark" }[theme];
  button.setAttribute("aria-label", `Theme: ${theme}. Change it.`);
  return before !== dark;
}

document.getElementById("theme").addEventListener("click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  try { localStorage.setItem("ovqk-theme", theme); } catch { /* as above */ }
  if (applyTheme()) redrawInPlace();
});
for (const query of [prefersDark, printing]) query.addEventListener("change", () => { if (applyTheme()) redrawInPlace(); });

/** Draw again in other colours: where one was reading, and with what was open still open. */
function redrawInPlace() {
  const open = [...main.querySelectorAll("details")].map((node) => node.open);
  const at = window.scrollY;
  show(false);
  main.querySelectorAll("details").forEach((node, k) => { node.open = open[k] || false; });
  window.scrollTo(0, at);
}

// --- tips -------------------------------------------------------------------------------------------------

const tipBox = document.getElementById("tip");

function showTip(node) {
  tipBox.textContent = node.getAttribute("data-tip");
  tipBox.hidden = !tipBox.textContent;
  const [box, own] = [node.getBoundingClientRect(), tipBox.getBoundingClientRect()];
  const x = Math.min(window.innerWidth - own.width - 8, Math.max(8, box.left + box.width / 2 - own.width / 2));
  const above = box.top - own.height - 10;
  tipBox.style.left = `${x}px`;
  tipBox.style.top = `${above > 4 ? above : box.bottom + 10}px`;
}

function hideTip() {
  tipBox.hidden = true;
}

for (const [enter, leave] of [["pointerover", "pointerout"], ["focusin", "focusout"]]) {
  document.addEventListener(enter, (event) => {
    const node = event.target.closest?.("[data-tip]");
    if (node) showTip(node);
  });
  document.addEventListener(leave, hideTip);
}
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
window.addEventListener("scroll", hideTip, { passive: true });

// --- start ------------------------------------------------------------------------------------------------

document.getElementById("foot").append(`Made by ovqk from the records beside this page. ${RAN.length ? "Verdicts are about weights, and those on prompts about what heads do there." : "Verdicts are about weights, not about a model's behaviour on task inputs."}`);
window.addEventListener("hashchange", () => show(true));
applyTheme();
show(false);
