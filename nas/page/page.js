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
    figure.drawn = true;
    const { data, layout } = resolve(figure.source, getComputedStyle(document.documentElement));
    const wide = figure.plot.clientWidth >= 600;
    const meta = layout.meta || {};
    if (!wide && meta.narrow) Object.entries(meta.narrow).forEach(([path, value]) => {
      const steps = path.split("."), last = steps.pop();
      steps.reduce((node, step) => node[step], layout)[last] = value;
    });
    (figure.off || []).forEach((i) => { data[i].visible = false; });
    marks(figure).forEach(([shape, changes]) => Object.assign(layout.shapes[shape], changes));
    Plotly.react(figure.plot, data, layout, { responsive: true, displaylogo: false, displayModeBar: false });
    if (!figure.bound) {
      figure.bound = true;
      figure.plot.on("plotly_click", (event) => { const key = keyOf(event.points[0]); if (key) choose(key); });
    }
  };

  // A point's key: its id, or where plotly would merge points of one id, its custom data or its trace's meta.
  const keyOf = (point) => {
    const { ids, meta } = point.data;
    return ids ? ids[Array.isArray(point.pointIndex) ? point.pointIndex[0] : point.pointIndex] : point.customdata || (meta && meta.key);
  };

  // Where the shapes that move stand: the rings around the chosen point and the one it is compared with, and the line
  // of the slider. As [number of the shape, what changes of it].
  const marks = (figure) => {
    const meta = figure.source.layout.meta || {};
    const rings = (meta.rings || []).map((shape, i) => {
      const at = place(figure.source.data, [chosen, second][i]);
      return [shape, at ? { visible: true, xanchor: at.x, yanchor: at.y } : { visible: false }];
    });
    return cursor !== null && meta.cursor !== undefined ? [...rings, [meta.cursor, { x0: cursor, x1: cursor }]] : rings;
  };
  const place = (data, key) => {
    for (const trace of data) {
      const at = key && trace.ids && trace.mode && trace.mode.includes("markers") ? trace.ids.indexOf(key) : -1;
      if (at >= 0 && trace.y && trace.y[at] !== null && trace.yaxis === undefined) return { x: trace.x[at], y: trace.y[at] };
    }
    return null;
  };
  const move = (figure) => Plotly.relayout(figure.plot, Object.fromEntries(marks(figure).flatMap(([shape, changes]) =>
    Object.entries(changes).map(([name, value]) => [`shapes[${shape}].${name}`, value]))));

  let chosen = "", second = "", cursor = null;
  const show = (next) => {
    ({ key: chosen, second = "", cursor = cursor } = next);
    const card = document.getElementById("candidate-" + chosen);
    document.querySelectorAll(".cards.choosable > article").forEach((a) => a.classList.toggle("chosen", a === card));
    document.querySelectorAll("tr[data-key]").forEach((row) => row.classList.toggle("chosen", row.dataset.key === chosen));
    figures.filter((f) => f.drawn && marks(f).length).forEach(move);
  };
  const choose = (key) => { if (document.getElementById("candidate-" + key)) show({ key }); };
  window.nasPage = { show };

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
    key.setAttribute("aria-pressed", String(!off));
    figure.off = (figure.off || []).filter((i) => !traces.includes(i)).concat(off ? traces : []);
    draw(figure);
  }));

  document.querySelectorAll(".views").forEach((views) => views.querySelectorAll(".tabs button").forEach((button, i) => button.addEventListener("click", () => {
    views.querySelectorAll(".tabs button").forEach((b) => { b.classList.toggle("on", b === button); b.setAttribute("aria-pressed", String(b === button)); });
    [...views.children].slice(1).forEach((body, j) => { body.hidden = i !== j; });
  })));

  document.querySelectorAll("button.copy").forEach((button) => button.addEventListener("click", () => {
    const code = button.previousElementSibling, done = () => { button.textContent = "copied"; setTimeout(() => { button.textContent = "copy"; }, 1500); };
    const select = () => { getSelection().selectAllChildren(code); document.execCommand("copy"); done(); };
    if (navigator.clipboard) navigator.clipboard.writeText(code.textContent).then(done, select); else select();
  }));

  const cards = document.querySelector(".cards[data-first]");
  if (cards) { cards.classList.add("choosable"); choose(cards.dataset.first); }

  // A figure is drawn when it comes near the window, so that a long page opens at once.
  const near = new IntersectionObserver((entries) => entries.filter((e) => e.isIntersecting).forEach((e) => {
    near.unobserve(e.target);
    draw(figures.find((f) => f.root === e.target));
  }), { rootMargin: "800px" });
  figures.forEach((figure) => near.observe(figure.root));
  const again = () => figures.filter((f) => f.drawn).forEach(draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  matchMedia("(min-width: 660px)").addEventListener("change", again);
  addEventListener("beforeprint", () => figures.forEach(draw));
})();
