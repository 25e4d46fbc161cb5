// The pictures that move, without Python: each is drawn from the numbers that its notebook stored (s2d.lab.moving).
"use strict";

const RED = "#d1495b", TEAL = "#00798c", GOLD = "#c98a12", GREY = "#8a8a8a";
const SHADES = [RED, "#e0777f", GOLD, "#f3cf8c", "#b9dbe0", TEAL];
const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes = {}, parent = null, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

// A panel of an SVG with its own coordinates: maps values to pixels, linearly or by logarithm.
class Panel {
  constructor(svg, { left, top, width, height, x, y, logY = false, title = "", xLabel = "", yLabel = "" }) {
    Object.assign(this, { left, top, width, height, x, y, logY });
    this.group = element("g", {}, svg);
    const across = { "text-anchor": "middle", "font-size": 13, fill: "currentColor" };
    element("text", { ...across, x: left + width / 2, y: top - 8 }, this.group, title);
    element("text", { ...across, "font-size": 12, x: left + width / 2, y: top + height + 32 }, this.group, xLabel);
    const turned = `rotate(-90 ${left - 36} ${top + height / 2})`;
    element("text", { ...across, "font-size": 12, x: left - 36, y: top + height / 2, transform: turned }, this.group, yLabel);
  }
  px(value) { return this.left + this.width * (value - this.x[0]) / (this.x[1] - this.x[0]); }
  py(value) {
    const [low, high] = this.logY ? this.y.map(Math.log) : this.y;
    const at = this.logY ? Math.log(Math.max(value, this.y[0])) : value;
    return this.top + this.height * (1 - (at - low) / (high - low));
  }
  frame(xTicks, yTicks, name = String) {
    const line = { stroke: "currentColor", "stroke-width": 1, "stroke-opacity": 0.6, fill: "none" };
    element("path", { ...line, d: `M${this.left} ${this.top}V${this.top + this.height}H${this.left + this.width}` }, this.group);
    const label = { fill: "currentColor", "font-size": 11 };
    for (const value of xTicks)
      element("text", { ...label, x: this.px(value), y: this.top + this.height + 15, "text-anchor": "middle" }, this.group, name(value));
    for (const value of yTicks)
      element("text", { ...label, x: this.left - 6, y: this.py(value) + 4, "text-anchor": "end" }, this.group, String(value));
  }
  bar(x, value, width, attributes, from = 0) {
    const [a, b] = [this.py(from), this.py(value)];
    return element("rect", { x: this.px(x - width / 2), y: Math.min(a, b), width: this.px(x + width / 2) - this.px(x - width / 2),
      height: Math.abs(a - b), ...attributes }, this.group);
  }
  line(points, attributes) {
    const path = points.map(([x, y], i) => `${i ? "L" : "M"}${this.px(x).toFixed(1)} ${this.py(y).toFixed(1)}`).join("");
    return element("path", { d: path, fill: "none", "stroke-width": 2, ...attributes }, this.group);
  }
  text(x, y, words, attributes = {}) {
    return element("text", { x: this.px(x), y: this.py(y), "font-size": 12, fill: "currentColor", ...attributes }, this.group, words);
  }
}

const ticks = (high, number = 4) => {
  const rough = high / number, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  return Array.from({ length: Math.floor(high / step + 1e-9) + 1 }, (_, i) => Number((i * step).toPrecision(6)));
};
const range = (n) => Array.from({ length: n }, (_, i) => i);
const radians = (degrees) => degrees * Math.PI / 180;
const percent = (share) => `${Math.round(100 * share)}%`;

// Each draws into an SVG of 720 by 340 and returns what is to be seen, in a sentence.
const PICTURES = {
  Ellipse(svg, { stretch, turn, angle }) {
    const first = 30, around = range(181).map((i) => radians(2 * i));
    const unit = (a) => [Math.cos(a), Math.sin(a)];
    const map = ([x, y]) => {
      const v = radians(first), u = radians(turn);
      const [a, b] = [stretch * (x * Math.cos(v) + y * Math.sin(v)), -x * Math.sin(v) + y * Math.cos(v)];
      return [a * Math.cos(u) - b * Math.sin(u), a * Math.sin(u) + b * Math.cos(u)];
    };
    const panel = (left, end, title) => new Panel(svg, { left, top: 36, width: 290, height: 290, x: [-end, end], y: [-end, end], title });
    const before = panel(30, 1.7, "inputs of length 1"), after = panel(400, 4.6, "what W makes of them");
    const arrow = (on, [x, y], stroke, name) => {
      on.line([[0, 0], [x, y]], { stroke, "stroke-width": 3 });
      element("circle", { cx: on.px(x), cy: on.py(y), r: 4.5, fill: stroke }, on.group);
      const away = 1 + 0.1 * on.x[1] / Math.max(Math.hypot(x, y), 1e-9);
      on.text(away * x, away * y, name, { fill: stroke, "text-anchor": "middle", "font-size": 14 });
    };
    for (const on of [before, after]) {
      on.line([[on.x[0], 0], [on.x[1], 0]], { stroke: GREY, "stroke-opacity": 0.3, "stroke-width": 1 });
      on.line([[0, on.y[0]], [0, on.y[1]]], { stroke: GREY, "stroke-opacity": 0.3, "stroke-width": 1 });
    }
    before.line(around.map(unit), { stroke: GREY });
    after.line(around.map((a) => unit(a).map((c) => stretch * c)), { stroke: GREY, "stroke-dasharray": "2 4" });
    after.line(around.map((a) => map(unit(a))), { stroke: GREY });
    const x = unit(radians(angle)), y = map(x);
    arrow(before, unit(radians(first)), RED, "v₁");
    arrow(before, unit(radians(first + 90)), TEAL, "v₂");
    arrow(before, x, GOLD, "x");
    arrow(after, unit(radians(turn)).map((c) => stretch * c), RED, "σ₁u₁");
    arrow(after, unit(radians(turn + 90)), TEAL, "σ₂u₂");
    arrow(after, y, GOLD, "Wx");
    return `The input at ${angle} degrees becomes ${Math.hypot(...y).toFixed(2)} times as long; no input does better than `
      + `sigma_1 = ${stretch.toFixed(2)} (dotted), which v_1 at ${first} degrees reaches and turns to ${turn}.`;
  },

  Decay(svg, { power, lam, steps }, { s }) {
    const STEPS = 300, LR = 0.1, path = [s];
    for (let step = 0; step < STEPS; step++) path.push(path[step].map((v) => Math.max(v - LR * lam * v ** power, 0)));
    const top = 1.05 * Math.max(...s), y = [0, top];
    const bars = new Panel(svg, { left: 60, top: 36, width: 370, height: 250, x: [0, s.length + 1], y,
      title: "the spectrum, before (outlines) and now", xLabel: "r", yLabel: "σᵣ" });
    const curves = new Panel(svg, { left: 490, top: 36, width: 210, height: 250, x: [0, STEPS], y, xLabel: "steps",
      title: "three of them" });
    bars.frame([1, s.length], ticks(top));
    curves.frame([0, 150, 300], []);
    s.forEach((value, r) => {
      bars.bar(r + 1, path[steps][r], 0.8, { fill: r ? TEAL : RED });
      bars.bar(r + 1, value, 0.8, { fill: "none", stroke: GREY });
    });
    for (const r of [0, Math.floor(s.length / 3), s.length - 1])
      curves.line(path.map((now, step) => [step, now[r]]), { stroke: r ? TEAL : RED });
    curves.line([[steps, 0], [steps, top]], { stroke: GREY, "stroke-dasharray": "2 4", "stroke-width": 1 });
    const last = s.length - 1;
    return `After ${steps} steps of lam ${lam} and power ${power}, sigma_1 went from ${s[0].toFixed(2)} to `
      + `${path[steps][0].toFixed(2)} and the smallest from ${s[last].toFixed(2)} to ${path[steps][last].toFixed(2)}.`;
  },

  Selection(svg, { tau, k, layer }, { layers, names, shares }) {
    const ratio = (stack) => Math.abs(stack.slice(0, k).reduce((a, b) => a + b, 0));
    const chosen = shares.filter((stack) => ratio(stack) >= tau).length;
    const over = new Panel(svg, { left: 60, top: 36, width: 400, height: 215, x: [-0.6, layers.length - 0.4], y: [0, 1.5],
      title: "PCDR of the largest activation; selected: red", yLabel: `PCDR, k = ${k}` });
    over.frame([], [0, 0.5, 1, 1.5]);
    layers.forEach((_, i) => {
      const value = ratio(shares[i]);
      over.bar(i, Math.min(value, 1.5), 0.8, { fill: value >= tau ? RED : GREY });
      const at = [over.px(i) + 4, over.top + over.height + 12];
      element("text", { x: at[0], y: at[1], transform: `rotate(-60 ${at[0]} ${at[1]})`, "text-anchor": "end", "font-size": 10,
        fill: "currentColor" }, over.group, names[i]);
    });
    over.line([[-0.6, tau], [layers.length - 0.4, tau]], { stroke: "currentColor", "stroke-dasharray": "3 3", "stroke-width": 1 });
    const stack = shares[layers.indexOf(layer)];
    const ends = [Math.min(0, stack.filter((v) => v < 0).reduce((a, b) => a + b, 0)), stack.filter((v) => v > 0).reduce((a, b) => a + b, 0)];
    const apart = new Panel(svg, { left: 530, top: 36, width: 170, height: 250, x: [-0.5, 0.9],
      y: [Math.min(1.1 * ends[0], -0.02), Math.max(1.1, 1.1 * ends[1])], title: "one activation apart" });
    apart.frame([], [0, 1]);
    let [up, down] = [0, 0];
    stack.forEach((share, i) => {
      const base = share >= 0 ? up : down;
      apart.bar(0, base + share, 0.6, { fill: SHADES[i] }, base);
      if (Math.abs(share) > 0.08)
        apart.text(0.36, base + share / 2, `${i < stack.length - 1 ? `σ${"₁₂₃₄₅"[i]}` : "rest"} ${percent(share)}`, { "font-size": 11 });
      if (share >= 0) up += share; else down += share;
    });
    apart.line([[-0.42, 1], [0.34, 1]], { stroke: "currentColor" });
    const made = k > 1 ? `The first ${k} components make` : "The first component makes";
    return `With k = ${k} and tau = ${tau}, ${chosen} of ${layers.length} layers are selected. ${made} ${percent(ratio(stack))} `
      + `of the largest activation of ${layer}.`;
  },

  Rounding(svg, { bits, clip, granularity, grid }, { x }) {
    const even = (v) => { const r = Math.round(v); return Math.abs(v % 1) === 0.5 && r % 2 ? r - 1 : r; };
    const shared = { "per tensor": () => 0, "per token": (i) => i, "per channel": (_, j) => j }[granularity];
    const low = [], high = [];
    x.forEach((row, i) => row.forEach((value, j) => {
      const at = shared(i, j);
      low[at] = Math.min(low[at] ?? 0, value);
      high[at] = Math.max(high[at] ?? 0, value);
    }));
    const scales = (b) => low.map((_, at) => {
      if (grid === "symmetric") {
        const last = 2 ** (b - 1) - 1;
        return { scale: Math.max(clip * Math.max(high[at], -low[at]) / last, 1e-12), zero: 0, from: -last, to: last };
      }
      const scale = Math.max(clip * (high[at] - low[at]) / (2 ** b - 1), 1e-12), zero = even(-clip * low[at] / scale);
      return { scale, zero, from: -zero, to: 2 ** b - 1 - zero };
    });
    const measure = (b) => {
      const grids = scales(b);
      let lost = 0, whole = 0, zeroed = 0, count = 0;
      x.forEach((row, i) => row.forEach((value, j) => {
        const { scale, from, to } = grids[shared(i, j)];
        const found = scale * Math.min(Math.max(even(value / scale), from), to);
        lost += (found - value) ** 2;
        whole += value ** 2;
        zeroed += found === 0 && value !== 0;
        count += 1;
      }));
      return { error: Math.sqrt(lost / whole), zeroed: zeroed / count, grid: grids[0] };
    };
    const flat = x.flat(), ends = [Math.min(...flat), Math.max(...flat)], BINS = 100;
    const counts = range(BINS).map(() => 0);
    for (const value of flat) counts[Math.min(BINS - 1, Math.floor(BINS * (value - ends[0]) / (ends[1] - ends[0])))] += 1;
    const width = (ends[1] - ends[0]) / BINS;
    const many = new Panel(svg, { left: 60, top: 36, width: 380, height: 250, x: ends, y: [0.6, 2 * Math.max(...counts)], logY: true,
      title: "activations of a sample, and grid points (red)", xLabel: "activation", yLabel: "how many" });
    many.frame(ticks(ends[1]), [1, 10, 100, 1000].filter((v) => v < many.y[1]));
    counts.forEach((count, i) => count && many.bar(ends[0] + (i + 0.5) * width, count, width, { fill: GREY, "fill-opacity": 0.7 }, 0.6));
    const now = measure(bits);
    for (let code = now.grid.from; code <= now.grid.to; code++) {
      const at = code * now.grid.scale;
      if (at >= ends[0] - 0.01 && at <= ends[1] + 0.01)
        element("line", { x1: many.px(at), x2: many.px(at), y1: many.top + 236, y2: many.top + 250, stroke: RED, "stroke-width": 1.5 }, many.group);
    }
    const errors = new Panel(svg, { left: 510, top: 36, width: 190, height: 250, x: [1.7, 8.3], y: [1e-3, 1.5], logY: true,
      title: "relative error", xLabel: "bits" });
    errors.frame([2, 4, 6, 8], [0.001, 0.01, 0.1, 1]);
    const all = range(7).map((i) => [i + 2, measure(i + 2).error]);
    errors.line(all, { stroke: TEAL });
    element("circle", { cx: errors.px(bits), cy: errors.py(now.error), r: 6, fill: RED }, errors.group);
    return `At ${bits} bits ${granularity}, ${grid}, ${percent(clip)} of the range: relative error ${now.error.toFixed(3)}, `
      + `${percent(now.zeroed)} of the entries become 0.`;
  },

  Browser(svg, { variant, layer }, { found }) {
    const here = found.filter((entry) => entry.layer === layer), own = here.find((entry) => entry.variant === variant);
    const top = Math.max(...here.map((entry) => entry.sigma[0])), widest = Math.max(...found.map((entry) => entry.largest));
    const spectrum = new Panel(svg, { left: 60, top: 36, width: 330, height: 250, x: [0, own.sigma.length + 1], y: [0, 1.05],
      title: "the spectrum (grey: the others)", xLabel: "r", yLabel: "σᵣ over the largest σ₁" });
    spectrum.frame([1, own.sigma.length], [0, 0.5, 1]);
    for (const entry of [...here.filter((other) => other !== own), own])
      spectrum.line(entry.sigma.map((value, r) => [r + 1, value / top]),
        entry === own ? { stroke: RED, "stroke-width": 2.5 } : { stroke: GREY, "stroke-opacity": 0.9, "stroke-width": 1 });
    const bars = new Panel(svg, { left: 540, top: 36, width: 160, height: 250, x: [0, 1.05 * widest], y: [here.length - 0.5, -0.5],
      xLabel: "largest activation" });
    bars.frame(ticks(widest, 2), []);
    here.forEach((entry, i) => {
      const [a, b] = [bars.py(i - 0.35), bars.py(i + 0.35)];
      element("rect", { x: bars.left, y: Math.min(a, b), width: bars.px(entry.largest) - bars.left, height: Math.abs(b - a),
        fill: entry === own ? TEAL : GREY }, bars.group);
      element("text", { x: bars.left - 6, y: (a + b) / 2 + 4, "text-anchor": "end", "font-size": 11, fill: "currentColor" }, bars.group,
        entry.variant);
    });
    const sorted = [...own.sigma].sort((a, b) => a - b), middle = (sorted.length - 1) / 2;
    const median = (sorted[Math.floor(middle)] + sorted[Math.ceil(middle)]) / 2;
    return `${layer} after ${variant}: sigma_1 ${own.sigma[0].toFixed(2)}, the median singular value ${median.toFixed(2)}, the largest `
      + `activation ${own.largest.toFixed(1)} (means over seeds).`;
  },
};

function control(name, spec, values, redraw) {
  const label = document.createElement("label"), says = document.createElement("span");
  says.textContent = spec.says;
  label.append(says);
  const input = document.createElement(spec.options ? "select" : "input"), shown = document.createElement("output");
  if (spec.options) {
    for (const option of spec.options) input.add(new Option(option, option));
  } else {
    Object.assign(input, { type: "range", min: spec.low, max: spec.high, step: spec.step });
  }
  input.value = values[name];
  const moved = () => {
    values[name] = spec.options ? input.value : Number(input.value);
    shown.textContent = spec.options ? "" : input.value;
    redraw();
  };
  input.addEventListener("input", moved);
  shown.textContent = spec.options ? "" : input.value;
  label.append(input, shown);
  if (spec.plays) label.append(player(input, spec));
  return label;
}

function player(input, spec) {
  const button = document.createElement("button");
  button.type = "button";
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; button.textContent = "play"; };
  button.addEventListener("click", () => {
    if (timer) return stop();
    if (Number(input.value) >= spec.high) input.value = spec.low;
    button.textContent = "stop";
    timer = setInterval(() => {
      input.value = Number(input.value) + spec.step;
      input.dispatchEvent(new Event("input"));
      if (Number(input.value) >= spec.high) stop();
    }, 50);
  });
  stop();
  return button;
}

function start(place) {
  const { picture, controls, numbers } = JSON.parse(place.querySelector("script").textContent);
  const svg = element("svg", { viewBox: "0 0 720 340", role: "img" });
  const sentence = document.createElement("p");
  sentence.setAttribute("aria-live", "polite");
  const values = Object.fromEntries(Object.entries(controls).map(([name, spec]) => [name, spec.start]));
  const redraw = () => {
    svg.replaceChildren();
    const said = PICTURES[picture](svg, values, numbers);
    svg.setAttribute("aria-label", said);
    sentence.textContent = said;
  };
  const box = document.createElement("div");
  box.className = "controls";
  for (const [name, spec] of Object.entries(controls)) box.append(control(name, spec, values, redraw));
  redraw();
  place.append(box, svg, sentence);
  place.classList.add("lives");
}

document.querySelectorAll("div.moving").forEach(start);
