"use strict";
// Drag over a curve to zoom, double-click to go back, move to read its values. A path's d holds shares
// of the chart's width and height, from its left and top; data-scale makes values of them (log10 on a
// logarithmic axis). metrics/report_chart.py writes it.

const charts = [...document.querySelectorAll("svg.chart")].map((svg) => {
  const views = [...svg.querySelectorAll("svg.view")];  // the curves; below them events
  const frame = svg.querySelector(".frame");
  const [left, top, width, height] = ["x", "y", "width", "height"].map(
    (name) => Number(frame.getAttribute(name)));
  return {
    axis: svg.dataset.axis, isLog: svg.dataset.log === "1", isWhole: svg.dataset.whole === "1",
    scale: svg.dataset.scale.split(" ").map(Number), views, frame, left, top, width, height,
    named: [...svg.querySelectorAll("[data-at]")],
    ticks: svg.querySelector(".ticks"), band: svg.querySelector(".band"),
    home: views.map((view) => view.getAttribute("viewBox").split(" ").map(Number)),
    curves: [...svg.querySelectorAll("path[data-name]")].map((path) => (
      {path, name: path.dataset.name, isEvent: path.closest("svg") !== views[0]})),
  };
});
const boxOf = (chart) => chart.views[0].getAttribute("viewBox").split(" ").map(Number);
const isShown = (curve) => !curve.path.classList.contains("off");
const pointsOf = (curve) => curve.points ??= curve.path.getAttribute("d").split("M").slice(1)
  .flatMap((line) => line.split(" ").map((pair) => pair.split(",").map(parseFloat)));

function text(value) {
  const isUsual = value === 0 || (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e6);
  return isUsual ? String(Number(value.toPrecision(5))) : value.toExponential(2);
}

// Shares of a chart as values of its axes, and back.
const xAt = ({scale: [left, right]}, share) => left + share * (right - left);
const yAt = ({scale: [, , low, high]}, share) => high - share * (high - low);
const shareOf = ({scale: [left, right]}, x) => (x - left) / (right - left);

function ticks(low, high, n, isWhole) {
  const least = (high - low) / n;
  const power = 10 ** Math.floor(Math.log10(least));
  let step = power * ([1, 2, 5].find((times) => times * power >= least) ?? 10);
  if (isWhole) step = Math.max(step, 1);
  const [first, last] = [Math.ceil(low / step), Math.floor(high / step)];
  return Array.from({length: Math.max(0, last - first + 1)}, (_, i) => (first + i) * step);
}

function tickLabels(places) {  // metrics/labels.py has the same
  const largest = Math.max(0, ...places.map(Math.abs));
  const fixed = (x, n) => x.toLocaleString("en-US", {minimumFractionDigits: n, maximumFractionDigits: n});
  if (places.length < 2 || largest === 0)
    return places.map((x) => Number.isInteger(x) && Math.abs(x) < 1e15 ? fixed(x, 0) : text(x));
  const gap = Math.abs(places[1] - places[0]);
  const digits = Math.floor(Math.log10(gap) + 1e-9);  // ticks() makes no 0.25
  const exact = Math.min(100, Math.max(0, Math.floor(Math.log10(largest)) - digits));
  const orZero = (write) => places.map((x) => Math.abs(x) < gap / 2 ? "0" : write(x));
  if (largest < 1e-3 || largest >= 1e16) return orZero((x) => x.toExponential(exact));
  for (const [size, power, letter] of [[1e9, 9, "B"], [1e6, 6, "M"], [1e3, 3, "k"]]) {
    const least = size > 1e3 && largest >= 1e3 * size ? 1e-3 : 0.1;
    if (largest >= Math.max(size, 1e4) && gap >= least * size * (1 - 1e-9))
      return orZero((x) => (x / size).toFixed(Math.max(0, power - digits)) + letter);
  }
  return places.map((x) => fixed(Math.abs(x) < gap / 2 ? 0 : x, Math.min(20, Math.max(0, -digits))));
}

function set(node, values) {
  Object.entries(values).forEach(([name, value]) => node.setAttribute(name, value));
}

function label(chart, words, x, y, anchor) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", "text");
  set(node, {x, y, "text-anchor": anchor});
  node.textContent = words;
  chart.ticks.append(node);
}

function show(chart, x, y, width, height) {
  chart.views.forEach((view, i) => {
    const [top, tall] = i ? [0, chart.home[i][3]] : [y, height];
    set(view, {viewBox: `${x} ${top} ${width} ${tall}`});
  });
  chart.ticks.replaceChildren();
  const bottom = chart.top + chart.height;
  const [left, right] = [xAt(chart, x), xAt(chart, x + width)];
  let places = ticks(left, right, 8, chart.isWhole);
  if (tickLabels(places).some((words) => words.length > 13))
    places = ticks(left, right, 4, chart.isWhole);
  for (const node of chart.named) {
    const at = chart.left + (node.dataset.at - x) / width * chart.width;
    if (at < chart.left || at > chart.left + chart.width) continue;
    set(node, {x: at});
    if (node.hasAttribute("transform"))
      set(node, {transform: `rotate(-60 ${at} ${node.getAttribute("y")})`});
    chart.ticks.append(node);
  }
  if (!chart.named.length) tickLabels(places).forEach((words, i) => label(chart, words,
    Math.min(chart.left + (places[i] - left) / (right - left) * chart.width, 960 - 3.4 * words.length),
    bottom + 15, "middle"));
  const [low, high] = [yAt(chart, y + height), yAt(chart, y)];
  const marks = ticks(low, high, chart.height / 30);
  const values = chart.isLog ? marks.map((at) => text(10 ** at)) : tickLabels(marks);
  values.forEach((words, i) => label(chart, words, chart.left - 6,
    bottom - (marks[i] - low) / (high - low) * chart.height + 4, "end"));
}

function zoom(source, x, y, width, height) {
  const [left, right] = [xAt(source, x), xAt(source, x + width)];
  for (const chart of charts.filter((other) => other.axis === source.axis)) {
    if (chart === source && height) { show(chart, x, y, width, height); continue; }
    const from = shareOf(chart, left);
    const wide = shareOf(chart, right) - from;
    // The height fits what is seen of the curves.
    const seen = chart.curves.filter((curve) => isShown(curve) && !curve.isEvent)
      .flatMap(pointsOf).filter((point) => point[0] >= from && point[0] <= from + wide);
    const low = seen.reduce((least, point) => Math.min(least, point[1]), Infinity);
    const high = seen.reduce((most, point) => Math.max(most, point[1]), -Infinity);
    const pad = 0.06 * (high - low) || 0.1;
    const [, top, , tall] = seen.length ? [0, low - pad, 0, high - low + 2 * pad] : boxOf(chart);
    show(chart, from, top, wide, tall);
  }
}

function read(chart, wanted, width) {  // what lies near this x, a line each
  return chart.curves.filter(isShown).flatMap((curve) => {
    const [x, y] = pointsOf(curve).reduce(
      (best, point) => Math.abs(point[0] - wanted) < Math.abs(best[0] - wanted) ? point : best);
    if (Math.abs(x - wanted) > width / (curve.isEvent ? 100 : 10)) return [];
    const height = yAt(chart, y);
    const value = curve.isEvent ? "" : ` ${text(chart.isLog ? 10 ** height : height)}`;
    const at = xAt(chart, x);
    const word = chart.named.find((node) => Math.abs(node.dataset.at - x) < 1e-5)?.textContent;
    return [`${curve.name}${value} at ${chart.axis} ${word ?? (chart.isWhole ? Math.round(at) : text(at))}`];
  });
}

const tip = document.body.appendChild(document.createElement("div"));
tip.className = "tip";
tip.hidden = true;
for (const chart of charts) {
  let start = null;
  const {frame, band} = chart;
  const place = (event) => {  // shares of the frame's width and height, 0 to 1
    const {left, top, width, height} = frame.getBoundingClientRect();
    return [(event.clientX - left) / width, (event.clientY - top) / height].map(
      (share) => Math.min(1, Math.max(0, share)));
  };
  const mark = (here) => {  // the rectangle from start to here; a flat one is the whole height
    const [x, right] = [start[0], here[0]].sort((a, b) => a - b);
    let [y, bottom] = [start[1], here[1]].sort((a, b) => a - b);
    const isFlat = (bottom - y) * chart.height < 20;
    if (isFlat) [y, bottom] = [0, 1];
    set(band, {x: chart.left + x * chart.width, y: chart.top + y * chart.height,
      width: (right - x) * chart.width, height: (bottom - y) * chart.height});
    return [x, right - x, y, isFlat ? 0 : bottom - y];
  };
  const end = (event) => {
    const [x, width, y, height] = mark(place(event));
    const [left, top, wide, tall] = boxOf(chart);
    if (width > 0.01) zoom(chart, left + x * wide, top + y * tall, width * wide, height * tall);
  };
  frame.onpointerdown = (event) => {
    start = place(event);
    frame.setPointerCapture(event.pointerId);
  };
  frame.onpointerup = frame.onpointercancel = (event) => {
    if (start && event.type === "pointerup") end(event);
    start = null;
    set(band, {width: 0});
  };
  frame.ondblclick = () => charts.filter((other) => other.axis === chart.axis)
    .forEach((other) => show(other, ...other.home[0]));
  frame.onpointerleave = () => { tip.hidden = true; };
  frame.onpointermove = (event) => {
    if (start) mark(place(event));
    const [x, , width] = boxOf(chart);
    tip.textContent = read(chart, x + place(event)[0] * width, width).slice(0, 14).join("\n");
    tip.hidden = !tip.textContent;
    tip.style.left = `${Math.min(event.pageX + 14, document.body.clientWidth - 240)}px`;
    tip.style.top = `${event.pageY + 14}px`;
  };
}
document.querySelectorAll("input[data-run]").forEach((box) => { box.onchange = () =>
  document.querySelectorAll(`path[data-run="${Number(box.dataset.run)}"]`)
    .forEach((path) => path.classList.toggle("off", !box.checked)); });
