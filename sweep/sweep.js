(() => {
  "use strict";
  const place = document.getElementById("parallel");
  if (!place) return;
  const { axes, points } = JSON.parse(document.getElementById("sweep-data").textContent);
  const node = (name, attributes, parent) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    parent?.append(made);
    return made;
  };
  const words = (value) => {
    if (typeof value !== "number") return String(value);
    const size = Math.abs(value);
    return size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(1).replace(".0e", "e") : String(Number(value.toPrecision(4)));
  };
  const height = 300, top = 44, bottom = 16, gap = 120;
  const brushes = new Map(); // axis index → [low, high] in pixels

  // Where a value lies on its axis: the best end of the metric is at the top, so are large numbers and first options.
  const position = (axis, value) => {
    if (axis.options) return top + ((axis.options.indexOf(value) + 0.5) / axis.options.length) * (height - top - bottom);
    const f = axis.log ? Math.log : (v) => v, low = f(axis.low), high = f(axis.high);
    const share = high > low ? (f(value) - low) / (high - low) : 0.5;
    return axis.down ? top + share * (height - top - bottom) : height - bottom - share * (height - top - bottom);
  };
  const ticks = (axis) => {
    if (axis.options) return axis.options;
    if (axis.ticks) return axis.ticks;
    const at = (share) => (axis.log ? Math.exp(Math.log(axis.low) + share * Math.log(axis.high / axis.low)) : axis.low + share * (axis.high - axis.low));
    return [0, 0.25, 0.5, 0.75, 1].map(at).map((v, i) => (axis.integer && i % 4 ? Math.round(v) : v));
  };

  function draw() {
    place.querySelector("svg")?.remove();
    const width = Math.max(place.clientWidth, axes.length * gap + 40), left = 56, right = 72;
    const x = (i) => (axes.length > 1 ? left + (i * (width - left - right)) / (axes.length - 1) : width / 2);
    const svg = node("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `${points.length} points over ${axes.map((a) => a.name).join(", ")}` }, place);
    const lines = node("g", {}, svg);
    for (const point of points) {
      const known = point.values.map((value, i) => (value === null ? null : [x(i), position(axes[i], value)])).filter(Boolean);
      if (!known.length) continue;
      const d = known.map(([px, py], i) => `${i ? "L" : "M"}${px.toFixed(1)} ${py.toFixed(1)}`).join("");
      const line = node("path", { class: `point ${point.colour === null ? "none" : `s${point.colour}`}`, d, "data-point": point.number }, lines);
      node("title", {}, line).textContent = `point ${point.number}: ${axes.map((a, i) => `${a.name} ${point.values[i] === null ? "–" : words(point.values[i])}`).join(", ")}`;
      line.addEventListener("pointerenter", () => choose(point.number));
      line.addEventListener("pointerleave", () => choose(null));
    }
    axes.forEach((axis, i) => {
      node("line", { class: "axis", x1: x(i), x2: x(i), y1: top - 6, y2: height - bottom + 6 }, svg);
      const end = i === axes.length - 1 && axes.length > 1;
      const name = node("text", { class: "name", x: x(i), y: 18, "text-anchor": i === 0 && axes.length > 1 ? "start" : end ? "end" : "middle" }, svg);
      name.textContent = axis.name.length > 20 ? `…${axis.name.slice(-19)}` : axis.name;
      if (i === 0 && axes.length > 1) name.setAttribute("x", Math.max(4, x(i) - 48));
      if (end) name.setAttribute("x", Math.min(width - 4, x(i) + 66));
      for (const tick of ticks(axis)) {
        const text = node("text", { x: x(i) + 6, y: position(axis, tick) + 3.5 }, svg);
        text.textContent = words(tick).slice(0, 14);
      }
      const hit = node("rect", { class: "hit", x: x(i) - 14, y: top - 8, width: 28, height: height - top - bottom + 16 }, svg);
      const shown = node("rect", { class: "brush", x: x(i) - 8, width: 16, y: 0, height: 0 }, svg);
      let from = null;
      const y = (event) => event.clientY - svg.getBoundingClientRect().top;
      hit.addEventListener("pointerdown", (event) => { from = y(event); hit.setPointerCapture(event.pointerId); });
      hit.addEventListener("pointermove", (event) => {
        if (from === null) return;
        const low = Math.min(from, y(event)), high = Math.max(from, y(event));
        brushes.set(i, [low, high]);
        shown.setAttribute("y", low); shown.setAttribute("height", high - low);
        filter();
      });
      hit.addEventListener("pointerup", (event) => {
        if (Math.abs(y(event) - from) < 4) { brushes.delete(i); shown.setAttribute("height", 0); filter(); } // a click clears it
        from = null;
      });
    });
    filter();
  }

  function filter() {
    for (const point of points) {
      const inside = [...brushes].every(([i, [low, high]]) => {
        const at = point.values[i] === null ? null : position(axes[i], point.values[i]);
        return at !== null && at >= low && at <= high;
      });
      place.querySelector(`[data-point="${point.number}"]`)?.classList.toggle("out", !inside);
      document.querySelector(`tr[data-point="${point.number}"]`)?.toggleAttribute("hidden", !inside);
    }
  }

  function choose(number) {
    place.classList.toggle("under", number !== null);
    for (const each of document.querySelectorAll("[data-point]")) each.classList.toggle("chosen", Number(each.dataset.point) === number);
  }
  for (const row of document.querySelectorAll("tr[data-point]")) {
    row.addEventListener("pointerenter", () => choose(Number(row.dataset.point)));
    row.addEventListener("pointerleave", () => choose(null));
  }
  addEventListener("resize", () => { brushes.clear(); draw(); });
  draw();
  document.documentElement.dataset.lines = place.querySelectorAll(".point").length;
})();
