// Speed against quality: one point for each sampler or student, at what an image costs.
(() => {
  "use strict";
  const { all, press, data: { planes }, exact, short, ticks, logTicks, svgNode, shapes, words, row } = kit;
  const margin = { left: 52, right: 18, top: 30, bottom: 40 };

  // The 1-2-5 numbers around a range, so that a logarithmic axis begins and ends at a tick.
  const around = (low, high) => {
    const steps = [];
    for (let p = Math.floor(Math.log10(low)) - 1; p <= Math.ceil(Math.log10(high)) + 1; p++) steps.push(1 * 10 ** p, 2 * 10 ** p, 5 * 10 ** p);
    return [steps.filter((s) => s < low * 0.97).pop(), steps.find((s) => s > high * 1.03)];
  };
  const padded = (values) => {
    const low = Math.min(...values), high = Math.max(...values), pad = (high - low) * 0.12 || Math.abs(high) * 0.1 || 1;
    return [low >= 0 ? Math.max(0, low - pad) : low - pad, high + pad];
  };

  function axis(values, from, to, log, count) {
    const f = log ? Math.log : (v) => v, [low, high] = log ? around(Math.min(...values), Math.max(...values)) : padded(values);
    const at = (v) => from + ((f(v) - f(low)) / (f(high) - f(low))) * (to - from);
    return { at, ticks: log ? logTicks(low, high) : ticks(low, high, count) };
  }

  // What no other point beats in both: from the cheapest on, every point that is better than all cheaper ones.
  const front = (points, higher) => {
    const kept = [];
    for (const p of [...points].sort((a, b) => a.x - b.x || (higher ? b.y - a.y : a.y - b.y)))
      if (!kept.length || (higher ? p.y > kept[kept.length - 1].y : p.y < kept[kept.length - 1].y)) kept.push(p);
    return kept;
  };

  const overlap = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];

  // A name goes beside its point where it covers nothing; one without room is told by the pointer alone.
  function label(svg, points, width, height) {
    const taken = points.map((p) => [p.px - 6, p.py - 6, p.px + 6, p.py + 6]);
    points.forEach((p, own) => {
      const long = 6.1 * p.name.length + 2, near = 11;
      const places = [[p.px + near, p.py - 7], [p.px - near - long, p.py - 7], [p.px - long / 2, p.py - 24], [p.px - long / 2, p.py + 10],
        [p.px + near - 2, p.py - 20], [p.px + near - 2, p.py + 6], [p.px - near - long + 2, p.py - 20], [p.px - near - long + 2, p.py + 6]];
      const free = places.map(([x, y]) => [x, y, x + long, y + 14]).find((box) =>
        box[0] >= margin.left + 2 && box[2] <= width - 2 && box[1] >= margin.top - 8 && box[3] <= height - margin.bottom
        && !taken.some((other, i) => i !== own && overlap(box, other)));
      if (!free) return;
      taken.push(free);
      svgNode("text", { class: "name", x: free[0] + 1, y: free[1] + 11 }, svg).textContent = p.name;
    });
  }

  function draw(figure) {
    const plane = planes[figure.dataset.plane], chosen = (axis) => plane[axis][figure.querySelector(`[data-of=${axis}] [aria-pressed=true]`).dataset.metric];
    const [xAxis, yAxis] = [chosen("x"), chosen("y")], higher = yAxis.better === "↑";
    const points = plane.points.map((p) => ({ ...p, x: p.values[xAxis.key], y: p.values[yAxis.key] })).filter((p) => p.x > 0 && p.y !== undefined);
    figure.querySelector("svg")?.remove();
    figure.querySelector(".tip")?.remove();
    const width = figure.clientWidth - 32, height = width < 560 ? 320 : 420;
    const svg = svgNode("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
    svg.setAttribute("aria-label", `${yAxis.title} over ${xAxis.title}: ${points.map((p) => `${p.name} ${exact(p.y)} at ${exact(p.x)}`).join("; ")}`);
    figure.querySelector("figcaption").before(svg);
    if (!points.length || width <= 0) return;
    const ys = points.map((p) => p.y), bottom = height - margin.bottom;
    const sx = axis(points.map((p) => p.x), margin.left, width - margin.right, true);
    const sy = axis(ys, bottom, margin.top, Math.min(...ys) > 0 && Math.max(...ys) > 20 * Math.min(...ys), 5);
    for (const t of sy.ticks) {
      svgNode("line", { class: "grid", x1: margin.left, x2: width - margin.right, y1: sy.at(t), y2: sy.at(t) }, svg);
      svgNode("text", { x: margin.left - 8, y: sy.at(t) + 3.5, "text-anchor": "end" }, svg).textContent = short(t);
    }
    for (const t of sx.ticks) {
      svgNode("line", { class: "grid", x1: sx.at(t), x2: sx.at(t), y1: margin.top, y2: bottom }, svg);
      svgNode("text", { x: sx.at(t), y: bottom + 16, "text-anchor": "middle" }, svg).textContent = short(t);
    }
    svgNode("text", { class: "axis-title", x: 0, y: 12 }, svg).textContent = `${yAxis.title} ${higher ? "↑ higher is better" : "↓ lower is better"}`;
    svgNode("text", { class: "axis-title", x: width - margin.right, y: height - 6, "text-anchor": "end" }, svg).textContent = `${xAxis.title} →`;
    for (const p of points) { p.px = sx.at(p.x); p.py = sy.at(p.y); }
    const best = front(points, higher);
    const stairs = best.map((p, i) => (i ? `H${p.px.toFixed(1)}V${p.py.toFixed(1)}` : `M${p.px.toFixed(1)} ${p.py.toFixed(1)}`)).join("");
    svgNode("path", { class: "front", d: stairs }, svg);
    for (const p of points)
      p.node = svgNode("path", { class: `mark s${p.colour}`, d: shapes[p.colour](0, 0), transform: `translate(${p.px.toFixed(1)} ${p.py.toFixed(1)}) scale(1.6)` }, svg);
    label(svg, points, width, height);
    const leave = () => { figure.querySelector(".tip")?.remove(); points.forEach((p) => p.node.classList.remove("chosen")); };
    const over = (event) => {
      const box = svg.getBoundingClientRect(), far = (p) => Math.hypot(p.px - (event.clientX - box.left), p.py - (event.clientY - box.top));
      const nearest = points.reduce((a, b) => (far(b) < far(a) ? b : a));
      leave();
      if (far(nearest) > 48) return;
      nearest.node.classList.add("chosen");
      const titles = [...plane.y, ...plane.x].filter((m) => nearest.values[m.key] !== undefined);
      const lines = titles.map((m) => row(words("span", m.title), words("b", exact(nearest.values[m.key]))));
      kit.tip(figure, [row(words("span", "", `swatch c${nearest.colour}`), words("b", nearest.name, "whose")), ...lines], nearest.px + 32, `${box.top - figure.getBoundingClientRect().top + Math.max(0, nearest.py - 40)}px`);
    };
    svg.addEventListener("pointermove", over);
    svg.addEventListener("pointerdown", over);
    svg.addEventListener("pointerleave", leave);
  }

  const figures = all(".plane");
  for (const figure of figures)
    all("[data-metric]", figure).forEach((button) => button.addEventListener("click", () => {
      all("button", button.parentElement).forEach((other) => press(other, other === button));
      draw(figure);
    }));
  kit.redrawn(() => figures.forEach(draw));
})();
