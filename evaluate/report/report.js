(() => {
  "use strict";
  const { root, all, press, data: { charts, runs }, exact, short, ticks, logTicks, svgNode, shapes, words, row, redrawn } = kit;
  const state = { axis: "step", smooth: 0, log: false, hidden: new Set() };

  // ---- curves ----
  // Exponential mean with the start-up bias divided out, so that a smoothed curve begins where the raw one does.
  const smoothed = (ys, weight) => {
    let mean = 0, mass = 0;
    return ys.map((y) => { mean = weight * mean + (1 - weight) * y; mass = weight * mass + 1 - weight; return mean / mass; });
  };
  const visible = (chart) => chart.series.filter((s) => !state.hidden.has(s.run));
  const xs = (series) => (state.axis === "samples" && series.samples.every((v) => v !== null) ? series.samples : series.step);
  const drawn = (series, chart) => (state.smooth && !chart.x && series.split !== "val" && series.y.length > 20 ? smoothed(series.y, state.smooth) : series.y);
  const path = (series, ys, sx, sy) => ys.map((y, i) => `${i ? "L" : "M"}${sx(xs(series)[i]).toFixed(1)} ${sy(y).toFixed(1)}`).join("");
  const colour = (series) => runs[series.run].colour;

  // Charts of one stage share their x axis, from the first step to the last, so that they can be read across.
  const reach = (stage) => Math.max(...charts.filter((c) => c.stage === stage).flatMap(visible).flatMap(xs));
  const doublings = (low, high) => { const out = []; for (let v = low; v <= high; v *= 2) out.push(v); return out; };

  function scales(series, chart, width, height) {
    const yAll = series.flatMap((s) => s.y);
    const useLog = (chart.x ? chart.log : state.log) && yAll.every((y) => y > 0);
    const x1 = reach(chart.stage) || 1, x0 = chart.logx ? Math.min(...series.flatMap(xs), x1 / 2) : 0;
    const g = chart.logx ? Math.log2 : (v) => v;
    let [y0, y1] = [Math.min(...yAll), Math.max(...yAll)];
    const pad = useLog ? 0 : y1 > y0 ? (y1 - y0) * 0.06 : Math.abs(y1) || 1;
    if (useLog) { y0 /= 1.05; y1 *= 1.05; } else { if (y0 < 0 || y0 - pad >= 0) y0 -= pad; else y0 = Math.min(0, y0); y1 += pad; }
    const yTicks = useLog ? logTicks(y0, y1) : ticks(y0, y1, 4);
    const left = 14 + 6.2 * Math.max(...yTicks.map((t) => short(t).length), 2), right = 8, top = 6, bottom = 20;
    const f = useLog ? Math.log : (v) => v;
    return {
      left, right: width - right, top, bottom: height - bottom, yTicks,
      xTicks: chart.logx ? doublings(x0, x1) : ticks(x0, x1, width > 500 ? 7 : 4),
      sx: (x) => left + ((g(x) - g(x0)) / (g(x1) - g(x0))) * (width - left - right),
      sy: (y) => height - bottom - ((f(y) - f(y0)) / (f(y1) - f(y0))) * (height - top - bottom),
    };
  }

  function draw(figure) {
    const chart = charts[figure.dataset.chart], series = visible(chart);
    figure.querySelector("svg")?.remove();
    figure.querySelector(".tip")?.remove();
    const width = figure.clientWidth - 32, height = 190;
    const svg = svgNode("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
    const split = series.filter((s) => s.split === "val");
    const final = (split.length ? split : series).map((s) => exact(s.y[s.y.length - 1]));
    svg.setAttribute("aria-label", `${chart.title}: last ${final.join(", ")}`);
    const over = [chart.note, chart.x && `over ${chart.x}`].filter(Boolean).join(", ");
    figure.querySelector(".last").textContent = chart.x ? over : final.length === 1 ? final[0] : "";
    figure.querySelector("figcaption").after(svg);
    if (!series.length || width <= 0) return;
    const scale = (figure.scale = scales(series, chart, width, height));
    for (const t of scale.yTicks) {
      svgNode("line", { class: "grid", x1: scale.left, x2: scale.right, y1: scale.sy(t), y2: scale.sy(t) }, svg);
      svgNode("text", { x: scale.left - 6, y: scale.sy(t) + 3.5, "text-anchor": "end" }, svg).textContent = short(t);
    }
    for (const t of scale.xTicks)
      svgNode("text", { x: scale.sx(t), y: height - 4, "text-anchor": scale.sx(t) > scale.right - 14 ? "end" : "middle" }, svg).textContent = short(t);
    const pale = (s) => s.split === "train" && split.length > 0;
    for (const s of [...series].sort((a, b) => pale(b) - pale(a))) {
      const ys = drawn(s, chart), own = `s${colour(s)}`;
      if (ys !== s.y) svgNode("path", { class: `line raw ${own}`, d: path(s, s.y, scale.sx, scale.sy) }, svg);
      svgNode("path", { class: `line ${own} ${pale(s) ? "train" : ""}`, d: path(s, ys, scale.sx, scale.sy) }, svg);
      if (s.y.length <= 30 && !pale(s))
        s.y.forEach((y, i) => svgNode("path", { class: `dot ${own}`, d: shapes[colour(s)](scale.sx(xs(s)[i]), scale.sy(y)) }, svg));
    }
    figure.overlay = svgNode("g", {}, svg);
    svg.addEventListener("pointermove", (event) => point(figure, event));
    svg.addEventListener("pointerdown", (event) => point(figure, event));
    svg.addEventListener("pointerleave", () => unpoint(figure));
  }

  const nearest = (values, x) => values.reduce((best, v, i) => (Math.abs(v - x) < Math.abs(values[best] - x) ? i : best), 0);

  function point(figure, event) {
    const chart = charts[figure.dataset.chart], series = visible(chart), { sx, sy, left, right, top, bottom } = figure.scale;
    const box = figure.querySelector("svg").getBoundingClientRect();
    const at = Math.min(right, Math.max(left, event.clientX - box.left));
    const found = series.map((s) => ({ s, i: nearest(xs(s).map(sx), at) }));
    const snapped = found.map(({ s, i }) => xs(s)[i]).reduce((a, b) => (Math.abs(sx(b) - at) < Math.abs(sx(a) - at) ? b : a));
    figure.overlay.replaceChildren();
    svgNode("line", { class: "cross", x1: sx(snapped), x2: sx(snapped), y1: top, y2: bottom }, figure.overlay);
    for (const { s, i } of found) svgNode("circle", { class: `dot s${colour(s)}`, cx: sx(xs(s)[i]), cy: sy(drawn(s, chart)[i]), r: 3.5 }, figure.overlay);
    tip(figure, found, snapped, sx(snapped));
  }

  function tip(figure, found, x, left) {
    const several = new Set(found.map(({ s }) => s.run)).size > 1;
    const head = row(words("span", `${charts[figure.dataset.chart].x ?? state.axis} ${x.toLocaleString("en").replace(/,/g, "\u2009")}`));
    kit.tip(figure, [head, ...found.map(({ s, i }) => row(
      words("span", "", `swatch c${colour(s)}`),
      words("span", [several ? runs[s.run].name : "", s.split].filter(Boolean).join(" · ") || "value"), words("b", exact(s.y[i])),
    ))], left + 32, "3rem");
  }

  function unpoint(figure) {
    figure.overlay.replaceChildren();
    figure.querySelector(".tip")?.remove();
  }

  const figures = all(".chart");
  const drawAll = () => figures.forEach(draw);
  for (const figure of figures) {
    const splits = new Set(charts[figure.dataset.chart].series.map((s) => s.split));
    if (!(splits.has("train") && splits.has("val"))) continue;
    const key = Object.assign(document.createElement("div"), { className: "key" });
    for (const name of ["train", "val"]) key.append(Object.assign(document.createElement("span"), { className: name, textContent: name }));
    figure.append(key);
  }
  all("[data-axis]").forEach((button) => button.addEventListener("click", () => {
    state.axis = button.dataset.axis;
    all("[data-axis]").forEach((other) => press(other, other === button));
    drawAll();
  }));
  all("[data-run]").forEach((button) => button.addEventListener("click", () => {
    const run = Number(button.dataset.run), hide = !state.hidden.has(run);
    state.hidden[hide ? "add" : "delete"](run);
    press(button, !hide);
    drawAll();
  }));
  document.getElementById("log")?.addEventListener("click", (event) => {
    press(event.currentTarget, (state.log = !state.log));
    drawAll();
  });
  document.getElementById("smooth")?.addEventListener("input", (event) => { state.smooth = event.target.value / 100; drawAll(); });

  // ---- tables ----
  for (const table of all("table.results")) all("thead th", table).forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const body = table.tBodies[0], cell = (row) => row.cells[column];
      const numeric = [...body.rows].some((row) => cell(row).dataset.value);
      const first = head.dataset.better === "↑" ? "descending" : "ascending";
      const other = { ascending: "descending", descending: "ascending" };
      const order = head.ariaSort ? other[head.ariaSort] : first, sign = order === "ascending" ? 1 : -1;
      const compare = (a, b) => {
        if (!numeric) return sign * cell(a).textContent.localeCompare(cell(b).textContent, "en", { numeric: true });
        const [x, y] = [cell(a).dataset.value, cell(b).dataset.value]; // a missing number stands last in either order
        return !x || !y ? (x ? -1 : y ? 1 : 0) : sign * (x - y);
      };
      all("thead th", table).forEach((each) => { each.ariaSort = null; });
      head.ariaSort = order;
      body.append(...[...body.rows].sort(compare));
    });
  });
  all(".protocol-id").forEach((link) => link.addEventListener("click", () => { document.querySelector(link.hash).open = true; }));

  // ---- pictures ----
  for (const book of all(".flipbook")) {
    const slider = book.querySelector("input");
    if (!slider) continue;
    const image = book.querySelector("img"), frames = JSON.parse(book.querySelector("script").textContent);
    const button = book.querySelector(".play"), label = book.querySelector("output");
    frames[frames.length - 1].src = image.src;
    const turn = (index) => {
      slider.value = index;
      image.src = frames[index].src;
      label.textContent = frames[index].step && `step ${frames[index].step}`;
    };
    book.turnTo = (step) => turn(nearest(frames.map((frame) => Number(frame.step)), step));
    // Books side by side turn together: each to its picture nearest to that step.
    const show = (index) => {
      turn(index);
      all(".flipbook", book.parentElement).forEach((other) => { if (other !== book) other.turnTo?.(Number(frames[index].step)); });
    };
    let timer = null;
    const stop = () => { clearInterval(timer); timer = null; button.textContent = "Play"; };
    slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
    button.addEventListener("click", () => {
      if (timer) return stop();
      let index = Number(slider.value) === frames.length - 1 ? 0 : Number(slider.value);
      button.textContent = "Pause";
      show(index);
      timer = setInterval(() => { if (++index >= frames.length) stop(); else show(index); }, 500);
    });
  }

  // ---- text ----
  all(".copy").forEach((button) => button.addEventListener("click", async () => {
    const text = button.nextElementSibling.textContent;
    try { await navigator.clipboard.writeText(text); } catch { // not offered to pages opened from disk
      const area = Object.assign(document.createElement("textarea"), { value: text });
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }));

  for (const more of all(".more")) {
    more.open = innerWidth > 640; // a phone begins with what matters most
    more.addEventListener("toggle", () => all(".chart", more).forEach(draw));
  }
  redrawn(drawAll);
  root.dataset.charts = all(".chart svg").length;
  root.dataset.ready = "true";
})();
