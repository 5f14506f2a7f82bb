// What every drawing of the page uses, and the choice of light and dark.
const kit = (() => {
  "use strict";
  const root = document.documentElement;
  // A page that broke says so where a test, or a reader of the source, finds it.
  addEventListener("error", (event) => { root.dataset.error = event.message; });
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const press = (button, on) => button.setAttribute("aria-pressed", String(on));
  const data = JSON.parse(document.getElementById("report-data").textContent);

  // ---- numbers ----
  const trim = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);
  const exact = (v) => {
    const size = Math.abs(v);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return v.toExponential(2);
    return trim(v.toPrecision(5).includes("e") ? String(Math.round(v)) : v.toPrecision(5));
  };
  const short = (v) => {
    const size = Math.abs(v);
    if (size >= 1e6) return trim((v / 1e6).toPrecision(3)) + "M";
    if (size >= 1e4) return trim((v / 1e3).toPrecision(3)) + "k";
    if (size !== 0 && size < 1e-3) return v.toExponential(0);
    return trim(v.toPrecision(4));
  };
  const ticks = (low, high, wanted) => {
    const raw = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
    const out = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) out.push(i * step);
    return out;
  };
  const logTicks = (low, high) => {
    const out = [];
    for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++)
      for (const m of [1, 2, 5]) { const v = m * 10 ** p; if (v >= low * 0.999 && v <= high * 1.001) out.push(v); }
    return out.length > 6 ? out.filter((v) => Math.abs(Math.log10(v) - Math.round(Math.log10(v))) < 1e-9) : out;
  };

  // ---- drawing ----
  const svgNode = (name, attributes, parent) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    parent?.append(node);
    return node;
  };
  const shapes = [
    (x, y) => `M${x - 3.5} ${y}a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0`, (x, y) => `M${x - 3} ${y - 3}h6v6h-6z`,
    (x, y) => `M${x} ${y - 4}l4 4l-4 4l-4 -4z`, (x, y) => `M${x} ${y - 4}l4 7h-8z`,
    (x, y) => `M${x} ${y + 4}l4 -7h-8z`, (x, y) => `M${x - 4} ${y + 2}a4 4 0 0 1 8 0z`,
  ];
  const words = (name, text, className = "") => Object.assign(document.createElement(name), { textContent: text, className });
  const row = (...parts) => { const line = document.createElement("div"); line.append(...parts); return line; };
  // A box of text beside `left`, inside the figure.
  const tip = (figure, lines, left, top) => {
    const box = figure.querySelector(".tip") ?? figure.appendChild(words("div", "", "tip"));
    box.replaceChildren(...lines);
    const room = figure.clientWidth - box.offsetWidth - 8;
    box.style.left = `${Math.max(8, left > room ? left - 28 - box.offsetWidth : left)}px`;
    box.style.top = top;
  };

  // ---- light and dark ----
  const button = document.getElementById("theme");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  const name = () => button?.setAttribute("aria-label", `switch to ${isDark() ? "light" : "dark"}`);
  button?.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("tokar-theme", root.dataset.theme); } catch { /* a page opened from disk may have no storage */ }
    name();
  });
  name();

  // Draw again whenever the page gets another width; in the next frame, since drawing may change the height of the page.
  const redrawn = (draw) => {
    let width = document.body.clientWidth;
    const check = () => { if (document.body.clientWidth !== width) { width = document.body.clientWidth; draw(); } };
    new ResizeObserver(() => requestAnimationFrame(check)).observe(document.body);
    draw();
  };
  return { root, all, press, data, exact, short, ticks, logTicks, svgNode, shapes, words, row, tip, redrawn };
})();
