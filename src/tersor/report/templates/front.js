"use strict";
// The explorer of a search: a chart of all points, and two of them side by side. Without it the page has the same
// numbers in static charts and a table.
(() => {
  const data = JSON.parse(document.getElementById("front-data").textContent);
  const element = (id) => document.getElementById(id);
  const points = new Map(data.points.map((point) => [point.name, point]));
  const evidence = data.evidence.points || {};
  const SVG = "http://www.w3.org/2000/svg";
  const HEIGHT = 360, LEFT = 52, RIGHT = 14, TOP = 12, BOTTOM = 40;
  const other = data.points.find((point) => point.kind === "artifact" && point.name !== data.original) || data.points[0];
  const chosen = [data.original, data.best === data.original ? other.name : data.best];
  let focused = data.best;

  function make(tag, text, attributes = {}) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  function draw(parent, tag, attributes, text) {
    const made = document.createElementNS(SVG, tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  }

  const known = (value) => value !== null && value !== undefined;
  const fixed = (value, digits) => (known(value) ? value.toFixed(digits) : "–");
  const number = (value) => (known(value) ? Number(value.toPrecision(3)).toLocaleString("en", { maximumFractionDigits: 6 }) : "–");
  const signed = (value) => (Math.abs(value) < 0.005 ? "±0" : (value > 0 ? "+" : "−") + Math.abs(value).toFixed(2)) + " points";

  function ratio(first, second) {
    if (!first || !second) return "";
    const lower = first / second;
    if (lower > 0.995 && lower < 1.005) return "the same";
    return lower > 1 ? lower.toFixed(2) + "x lower" : (1 / lower).toFixed(2) + "x higher";
  }

  const size = () => element("batch").value;
  const AXES = {
    latency: { title: () => "ms at batch " + size(), of: (point) => point.latency[size()], text: (point) => point.milliseconds[size()], limit: () => data.limits.latency_ms[size()] },
    megabytes: { title: () => "MB", of: (point) => point.megabytes, limit: () => data.limits.megabytes },
    macs: { title: () => "million MACs", of: (point) => point.macs, limit: () => null },
    peak: { title: () => "% of the peak throughput at batch " + size(), of: (point) => point.peak[size()], limit: () => null },
  };
  const METRICS = {
    validation: "on the validation images, %",
    test: "on the test images, %",
  };

  function label(point) {
    const x = AXES[element("x").value];
    return point.name + " (" + point.description + "), " + point.runtime + ": " + data.metric + " " +
      fixed(point[element("y").value], 2) + " %, " + (x.text ? x.text(point) : number(x.of(point))) + " " + x.title();
  }

  function shownPoints() {
    const families = new Set([...document.querySelectorAll("#families input:checked")].map((box) => box.value));
    const x = AXES[element("x").value], y = element("y").value;
    return data.points
      .filter((point) => families.has(point.family) && known(x.of(point)) && x.of(point) > 0 && known(point[y]))
      .sort((one, other) => x.of(one) - x.of(other) || one[y] - other[y]);
  }

  // 1, 2 and 5 times powers of ten, those inside of the range; the smallest and the largest value where these are
  // fewer than two.
  function ticks(low, high, values) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
      for (const step of [1, 2, 5]) if (step * 10 ** power >= low && step * 10 ** power <= high) found.push(step * 10 ** power);
    return found.length > 1 ? found : [...new Set([Math.min(...values), Math.max(...values)])];
  }

  function drawChart() {
    const svg = element("chart"), shown = shownPoints();
    const x = AXES[element("x").value], y = element("y").value, width = svg.parentElement.clientWidth;
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    svg.setAttribute("aria-label", `${shown.length} points: ${data.metric} ${METRICS[y]} against ${x.title()}`);
    element("shown").textContent = `${shown.length} of ${data.points.length} points shown.`;
    if (!shown.length) return;
    const limit = x.limit(), values = shown.map(x.of).concat(known(limit) ? [limit] : []);
    const low = Math.min(...values) / data.chart.margin, high = Math.max(...values) * data.chart.margin;
    const best = Math.max(...shown.map((point) => point[y]));
    const worst = Math.max(best - data.chart.shown_drop, Math.min(...shown.map((point) => point[y])));
    const margin = data.chart.vertical_margin * Math.max(best - worst, 0.1), bottom = worst - margin, top = best + margin;
    const across = (value) => LEFT + ((width - LEFT - RIGHT) * Math.log(value / low)) / Math.log(high / low);
    const down = (value) => HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * Math.max(0, (value - bottom) / (top - bottom));
    const base = HEIGHT - BOTTOM;
    for (const value of ticks(low, high, values)) {
      draw(svg, "line", { x1: across(value), x2: across(value), y1: TOP, y2: base, class: "tick" });
      draw(svg, "text", { x: across(value), y: base + 16, "text-anchor": "middle" }, number(value));
    }
    for (let step = 0; step <= 4; step++) {
      const value = bottom + ((top - bottom) * step) / 4;
      draw(svg, "line", { x1: LEFT, x2: width - RIGHT, y1: down(value), y2: down(value), class: "tick" });
      draw(svg, "text", { x: LEFT - 6, y: down(value) + 4, "text-anchor": "end" }, value.toFixed(1));
    }
    draw(svg, "text", { x: (LEFT + width - RIGHT) / 2, y: HEIGHT - 6, "text-anchor": "middle" }, x.title());
    if (known(limit)) draw(svg, "line", { x1: across(limit), x2: across(limit), y1: TOP, y2: base, class: "limit" });
    if (known(data.limits.max_drop)) {
      const least = points.get(data.original)[y] - data.limits.max_drop;
      if (least > bottom) draw(svg, "line", { x1: LEFT, x2: width - RIGHT, y1: down(least), y2: down(least), class: "limit" });
    }
    if (!shown.some((point) => point.name === focused)) focused = shown[0].name;
    const order = ["original", "baseline", "artifact"];
    for (const point of [...shown].sort((one, other) => order.indexOf(one.kind) - order.indexOf(other.kind))) {
      const place = chosen.indexOf(point.name);
      const circle = draw(svg, "circle", {
        cx: across(x.of(point)), cy: down(point[y]), r: place < 0 ? 5 : 8, class: point.kind + (place < 0 ? "" : " chosen"),
        role: "button", tabindex: point.name === focused ? 0 : -1, "aria-label": label(point), "aria-pressed": place >= 0, "data-name": point.name,
      });
      if (place >= 0) draw(svg, "text", { x: across(x.of(point)), y: down(point[y]) - 12, "text-anchor": "middle", class: "mark" }, "AB"[place]);
      circle.addEventListener("mouseenter", () => hover(circle));
      circle.addEventListener("mouseleave", () => hover(null));
      circle.addEventListener("focus", () => { focused = point.name; hover(circle); });
      circle.addEventListener("blur", () => hover(null));
      circle.addEventListener("click", () => choose(point.name));
      circle.addEventListener("keydown", (event) => move(event, shown, point));
    }
  }

  function hover(circle) {
    const tip = element("tip");
    tip.hidden = !circle;
    if (!circle) return;
    tip.textContent = label(points.get(circle.dataset.name));
    const box = element("chart").parentElement.clientWidth;
    tip.style.left = Math.max(0, Math.min(circle.cx.baseVal.value - 130, box - 260)) + "px";
    tip.style.top = circle.cy.baseVal.value + 14 + "px";
  }

  function move(event, shown, point) {
    const place = shown.indexOf(point);
    const target = { ArrowRight: place + 1, ArrowDown: place + 1, ArrowLeft: place - 1, ArrowUp: place - 1, Home: 0, End: shown.length - 1 }[event.key];
    if (event.key === "Enter" || event.key === " ") choose(point.name);
    else if (target !== undefined && shown[target]) {
      focused = shown[target].name;
      for (const each of element("chart").querySelectorAll("circle")) each.tabIndex = each.dataset.name === focused ? 0 : -1;
      focusChart();
    } else if (target === undefined) return;
    event.preventDefault();
  }

  const focusChart = () => element("chart").querySelector(`[data-name="${CSS.escape(focused)}"]`).focus();

  // A chosen point replaces the one that was chosen first; the other one stays.
  function choose(name) {
    if (!chosen.includes(name)) { chosen.shift(); chosen.push(name); }
    focused = name;
    const inside = element("chart").contains(document.activeElement);
    update();
    if (inside) focusChart();
  }

  function table(caption, titles, rows) {
    const box = make("div", undefined, { class: "scroll", tabindex: 0, role: "region", "aria-label": caption });
    const made = make("table");
    made.append(make("caption", caption));
    const head = make("tr");
    for (const title of titles) head.append(make("th", title, { scope: "col" }));
    const top = make("thead"), body = make("tbody");
    top.append(head);
    for (const [title, ...cells] of rows) {
      const row = make("tr");
      row.append(make("th", title, { scope: "row" }));
      for (const cell of cells) {
        const made = make("td");
        made.append(cell);
        row.append(made);
      }
      body.append(row);
    }
    made.append(top, body);
    box.append(made);
    return box;
  }

  function bar(value, largest, kind) {
    const cell = make("span", number(value) + " ms ", { class: "barred" });
    const svg = draw(cell, "svg", { width: 90, height: 10, "aria-hidden": true, class: "bar " + kind });
    draw(svg, "rect", { width: largest ? (90 * value) / largest : 0, height: 10, rx: 1 });
    return cell;
  }

  function summary(first, second) {
    const row = (title, of, compared) => [title, ...[first, second].map((each) => of(each)), compared || ""];
    const cost = (title, of) => row(title, (each) => number(of(each)), ratio(of(first), of(second)));
    const metric = (title, key) => row(title, (each) => fixed(each[key], 2), known(first[key]) && known(second[key]) ? signed(second[key] - first[key]) : "");
    const agreement = (each) => (evidence[each.name] || { agreement: {} }).agreement;
    const between = agreement(first)[second.name] ?? agreement(second)[first.name];
    return [
      row("point", (each) => each.name), row("network", (each) => each.description), row("runtime", (each) => each.runtime + ", " + each.precision),
      metric("validation, %", "validation"), metric("test, %", "test"),
      row("prediction agreement with the original, %", (each) => fixed(agreement(each)[data.original], 2)),
      row("prediction agreement of the two, %", () => "", fixed(between, 2)),
      ...data.sizes.map((each) => row(`latency at batch ${each}, ms`, (point) => point.milliseconds[each], ratio(first.latency[each], second.latency[each]))),
      cost("file, MB", (each) => each.megabytes), cost("MACs, million", (each) => each.macs),
      ...data.sizes.map((each) => row(`% of the peak throughput at batch ${each}`, (point) => number(point.peak[each]))),
      row("training steps", (each) => each.steps.toLocaleString("en")), row("training, s", (each) => number(each.seconds)),
    ];
  }

  function byClass(one, other) {
    const rows = one.by_class.map((value, place) => [data.evidence.classes[place], value, other.by_class[place]]);
    const known_ = rows.filter(([, before, after]) => known(before) && known(after));
    const most = known_.length > 20 ? known_.sort((a, b) => Math.abs(b[2] - b[1]) - Math.abs(a[2] - a[1])).slice(0, 20) : known_;
    return most.map(([name, before, after]) => [name, fixed(before, 1), fixed(after, 1), signed(after - before)]);
  }

  function times(one, other) {
    const [before, after] = [one, other].map((each) => new Map(each.time[size()].map(([kind, nodes, ms]) => [kind, [nodes, ms]])));
    const largest = Math.max(...[...before.values(), ...after.values()].map(([, ms]) => ms));
    const cells = (kinds, kind, colour) => (kinds.has(kind) ? [String(kinds.get(kind)[0]), bar(kinds.get(kind)[1], largest, colour)] : ["–", "–"]);
    return [...new Set([...before.keys(), ...after.keys()])].map((kind) => [kind, ...cells(before, kind, "original"), ...cells(after, kind, "artifact")]);
  }

  function layers(one, other) {
    const [before, after] = [one, other].map((each) => new Map(each.layers.map(([name, ...rest]) => [name, rest])));
    return [...new Set([...before.keys(), ...after.keys()])].map((name) => {
      const [first, second] = [before.get(name), after.get(name)];
      const pair = (of) => [first, second].map((each) => (each ? of(each) : "–"));
      return [name, ...pair((each) => String(each[0])), ...pair((each) => String(each[1])), ...pair((each) => number(each[2][size()]))];
    });
  }

  function changedImages(first, second) {
    const name = (number) => (known(number) ? data.evidence.classes[number] ?? "class " + number : "no label");
    const box = make("div", undefined, { class: "images" });
    for (const image of data.evidence.examples.filter((each) => each.predicted[first.name] !== each.predicted[second.name]).slice(0, 24)) {
      const figure = make("figure"), caption = make("figcaption");
      figure.append(make("img", undefined, { src: image.png, alt: `test image ${image.index}, labeled ${name(image.label)}` }), caption);
      caption.append(make("b", name(image.label)), make("span", "A: " + name(image.predicted[first.name])), make("span", "B: " + name(image.predicted[second.name])));
      box.append(figure);
    }
    return box.childElementCount ? box : make("p", "None of the stored images.");
  }

  function compare() {
    const [first, second] = chosen.map((name) => points.get(name)), [one, other] = chosen.map((name) => evidence[name]);
    const box = element("pair");
    const section = (title, content) => { box.append(make("h3", title), content); };
    box.replaceChildren(table("The two points", ["property", "A", "B", "B compared with A"], summary(first, second)));
    if (!one || !other) {
      box.append(make("p", "For at least one of these points, scores by class, layers and node times are not stored. They are stored at the end of a search, for the Pareto front and the free baselines of the target runtime.", { class: "note" }));
      return;
    }
    if (one.by_class.length && other.by_class.length) section("Score by class: " + data.metric, table("Score by class", ["class", "A, %", "B, %", "difference"], byClass(one, other)));
    section("Time by operator, batch " + size(), make("p", "From the runtime's node profile. Profiling adds a few microseconds to each node, and the two files were not profiled in the same rounds: compare shares, not milliseconds. The latencies above are from interleaved rounds.", { class: "note" }));
    box.append(table("Time by operator", ["operator", "nodes, A", "time, A", "nodes, B", "time, B"], times(one, other)));
    section("Layers, time at batch " + size(), table("Layers", ["layer", ...["channels", "bits", "ms"].flatMap((each) => [each + ", A", each + ", B"])], layers(one, other)));
    if (data.evidence.examples.length) section("Images with different predictions", changedImages(first, second));
  }

  function update() {
    ["first", "second"].forEach((id, place) => { element(id).value = chosen[place]; });
    drawChart();
    compare();
  }

  ["first", "second"].forEach((id, place) => element(id).addEventListener("change", (event) => { chosen[place] = event.target.value; update(); }));
  for (const id of ["x", "y", "batch"]) element(id).addEventListener("change", update);
  element("families").addEventListener("change", drawChart);
  window.addEventListener("resize", drawChart);
  element("explorer").hidden = false;
  element("static").hidden = true;
  update();
})();
