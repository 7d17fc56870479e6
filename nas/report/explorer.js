"use strict";
(() => {
  const root = document.querySelector(".explorer");
  if (!root) return;
  const data = JSON.parse(root.querySelector(".explorer-data").textContent);
  const slider = root.querySelector("input"), output = root.querySelector("output"), said = root.querySelector(".answer");
  const pair = document.querySelector(".explorer-pair"), changes = document.querySelector(".explorer-changes");
  const all = [...data.candidates].sort((a, b) => a.latency_ms - b.latency_ms || b.quality - a.quality);

  const budgetAt = (position) => (position === data.positions ? data.budget_ms
    : data.from_ms + position * (data.budget_ms - data.from_ms) / data.positions);
  const time = (ms) => (ms >= 1000 ? `${Number((ms / 1000).toFixed(3))} s` : `${Number(ms.toPrecision(4))} ms`);

  // The fastest whose quality cannot be told from the best one's: within two of the best one's standard deviations.
  const recommended = (fitting) => {
    if (!fitting.length) return null;
    const best = fitting.reduce((a, b) => (b.quality > a.quality ? b : a));
    const tie = 2 * Math.max(best.spread, data.least_spread);
    return { best, tie, taken: fitting.find((c) => c.quality >= best.quality - tie) };
  };
  const answer = (budget) => {
    const fitting = all.filter((c) => c.high_ms <= budget), found = recommended(fitting);
    if (!found) return { fitting };
    const second = recommended(fitting.filter((c) => c !== found.taken));
    return { fitting, ...found, second: second && second.taken };
  };
  const keyAt = (position) => { const { taken } = answer(budgetAt(position)); return taken ? taken.key : ""; };

  const element = (name, text, attributes = {}) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
    return made;
  };
  const table = (head, rows) => {
    const made = element("table"), body = element("tbody"), top = element("tr");
    head.forEach((text) => top.append(element("th", text, { scope: "col" })));
    rows.forEach((cells) => {
      const line = element("tr");
      cells.forEach((text, i) => line.append(i ? element("td", text) : element("th", text, { scope: "row" })));
      body.append(line);
    });
    const header = element("thead");
    header.append(top);
    made.append(header, body);
    const scroll = element("div", undefined, { class: "scroll" });
    scroll.append(made);
    return scroll;
  };

  const words = (budget, { fitting, taken, best, tie, second }) => {
    if (!taken) return [`No scored candidate fits ${time(budget)}.`];
    const why = taken === best ? "the best quality that fits"
      : `the fastest that ties with the best that fits (${best.key}, ${best.words[1]}; a tie is ${Number(tie.toPrecision(2))} ${data.unit})`;
    return [
      "Take ", element("b", taken.key, { class: "key" }), `: ${taken.words[0]}, ${taken.words[1]}, ${why}. `,
      ...(second ? ["Runner-up: ", element("b", second.key), `, ${second.words[0]}, ${second.words[1]}. `] : []),
      `${fitting.length} of ${all.length} scored candidates fit.`,
    ];
  };
  const compare = ({ taken, second }) => {
    if (!taken) return [];
    const both = second ? [taken, second] : [taken];
    const differing = data.choices.map((_, i) => i).filter((i) => second && taken.choices[i] !== second.choices[i]);
    const rows = data.facts.map((name, i) => [name, ...both.map((c) => c.facts[i])])
      .concat(differing.map((i) => [data.choices[i], ...both.map((c) => c.choices[i] || "–")]));
    const same = second ? `The other ${data.choices.length - differing.length} choices are the same in both.` : "";
    return [table(["", `${taken.key} (taken)`, ...(second ? [`${second.key} (runner-up)`] : [])], rows), element("p", same, { class: "note" })];
  };

  let waiting = false;
  const show = () => {
    waiting = false;
    const budget = budgetAt(Number(slider.value)), found = answer(budget);
    output.textContent = time(budget);
    slider.setAttribute("aria-valuetext", found.taken ? `${time(budget)}: ${found.taken.key}` : `${time(budget)}: nothing fits`);
    said.replaceChildren(...words(budget, found));
    pair.replaceChildren(...compare(found));
    window.nasPage.show({ key: found.taken ? found.taken.key : "", second: found.second ? found.second.key : "", cursor: budget });
  };
  slider.addEventListener("input", () => { if (!waiting) { waiting = true; requestAnimationFrame(show); } });

  root.querySelectorAll(".step").forEach((button) => button.addEventListener("click", () => {
    const step = Number(button.dataset.step), from = Number(slider.value), before = keyAt(from);
    let to = from;
    while (to + step >= 0 && to + step <= data.positions && keyAt(to) === before) to += step;
    slider.value = to;
    show();
  }));

  const steps = [...new Set(all.map((c) => c.high_ms))].sort((a, b) => a - b).map((budget) => ({ budget, ...answer(budget) }));
  const turns = steps.filter((s, i) => !i || s.taken !== steps[i - 1].taken);
  changes.append(table(["from a budget of", "take", "latency", "quality"], turns.map(({ budget, taken }) => [time(budget), taken.key, ...taken.words])));
  show();
})();
