"use strict";
(() => {
  const figures = [...document.querySelectorAll("figure")].map((root) => ({
    root,
    plot: root.querySelector(".plot"),
    source: JSON.parse(root.querySelector(".figure-data").textContent),
  }));

  // A colour "@name" is the CSS variable --name of the scheme in force.
  const resolve = (value, style) => {
    if (typeof value === "string") return value.startsWith("@") ? style.getPropertyValue("--" + value.slice(1)).trim() : value;
    if (Array.isArray(value)) return value.map((v) => resolve(v, style));
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, resolve(v, style)]));
    return value;
  };

  const draw = (figure) => {
    if (figure.plot.offsetParent === null) return;  // a hidden view has no width yet
    const { data, layout } = resolve(figure.source, getComputedStyle(document.documentElement));
    const wide = figure.plot.clientWidth >= 600;
    const meta = layout.meta || {};
    if (!wide && meta.narrow) Object.entries(meta.narrow).forEach(([path, value]) => {
      const steps = path.split("."), last = steps.pop();
      steps.reduce((node, step) => node[step], layout)[last] = value;
    });
    (figure.off || []).forEach((i) => { data[i].visible = false; });
    if (chosen && meta.ring !== undefined) ring(data, meta.ring);
    Plotly.react(figure.plot, data, layout, { responsive: true, displaylogo: false, displayModeBar: false });
    if (!figure.bound) {
      figure.bound = true;
      figure.plot.on("plotly_click", (event) => { const key = keyOf(event.points[0]); if (key) choose(key); });
    }
  };

  const keyOf = (point) => {
    const ids = point.data.ids;
    return ids ? ids[Array.isArray(point.pointIndex) ? point.pointIndex[0] : point.pointIndex] : point.data.meta && point.data.meta.key;
  };

  // The ring around the chosen point: an empty trace that takes the point's place.
  const ring = (data, index) => {
    for (const trace of data) {
      const at = trace.ids ? trace.ids.indexOf(chosen) : -1;
      if (at >= 0 && trace.y && trace.y[at] !== null && trace.mode && trace.mode.includes("markers")) {
        data[index].x = [trace.x[at]];
        data[index].y = [trace.y[at]];
        return;
      }
    }
  };

  let chosen = null;
  const choose = (key) => {
    const card = document.getElementById("candidate-" + key);
    if (!card) return;
    chosen = key;
    document.querySelectorAll(".cards.choosable > article").forEach((a) => a.classList.toggle("chosen", a === card));
    document.querySelectorAll("tr[data-key]").forEach((row) => row.classList.toggle("chosen", row.dataset.key === key));
    figures.filter((f) => f.source.layout.meta && f.source.layout.meta.ring !== undefined).forEach(draw);
  };

  document.querySelectorAll("tr[data-key]").forEach((row) => {
    row.addEventListener("click", () => choose(row.dataset.key));
    row.addEventListener("keydown", (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); choose(row.dataset.key); } });
  });

  document.querySelectorAll("table.sortable").forEach((table) => {
    const heads = [...table.querySelectorAll("th")], body = table.tBodies[0];
    heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((h) => h.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => { const cell = row.cells[column]; return cell.dataset.sort !== undefined ? cell.dataset.sort : cell.textContent; };
      const compare = (a, b) => {
        const x = value(a), y = value(b), n = Number(x) - Number(y);
        return Number.isNaN(n) ? x.localeCompare(y) : n;
      };
      [...body.rows].sort((a, b) => (down ? -1 : 1) * compare(a, b)).forEach((row) => body.append(row));
    }));
  });

  document.querySelectorAll(".legend .key").forEach((key) => key.addEventListener("click", () => {
    const figure = figures.find((f) => f.root.contains(key));
    const traces = JSON.parse(key.dataset.traces), off = key.classList.toggle("off");
    figure.off = (figure.off || []).filter((i) => !traces.includes(i)).concat(off ? traces : []);
    draw(figure);
  }));

  document.querySelectorAll(".views").forEach((views) => views.querySelectorAll(".tabs button").forEach((button, i) => button.addEventListener("click", () => {
    views.querySelectorAll(".tabs button").forEach((b) => b.classList.toggle("on", b === button));
    [...views.children].slice(1).forEach((body, j) => { body.hidden = i !== j; });
    figures.filter((f) => views.contains(f.root)).forEach(draw);
  })));

  document.querySelectorAll("button.copy").forEach((button) => button.addEventListener("click", () => {
    const code = button.previousElementSibling, done = () => { button.textContent = "copied"; setTimeout(() => { button.textContent = "copy"; }, 1500); };
    const select = () => { getSelection().selectAllChildren(code); document.execCommand("copy"); done(); };
    if (navigator.clipboard) navigator.clipboard.writeText(code.textContent).then(done, select); else select();
  }));

  const cards = document.querySelector(".cards[data-first]");
  if (cards) { cards.classList.add("choosable"); chosen = cards.dataset.first; choose(chosen); }
  figures.forEach(draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => figures.forEach(draw));
})();
