"use strict";
// Draws the report's curves and scrolls its slices. Everything it shows is in the page's own data; text is set as
// text, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const COLOURS = 8;

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function drawn(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const colourOf = (curve) => `var(--c${curve.colour % COLOURS})`;
const inWords = (value) =>
  value === null || value === undefined ? "–" : value === 0 ? "0" : Math.abs(value) < 0.0001 ? Number(value.toPrecision(3)).toExponential() : String(Number(value.toPrecision(4)));
const thousands = (value) => Math.round(value).toLocaleString("en-US");

// ---- curves ----

function niceTicks(low, high, most) {
  const raw = (high - low) / most || 1;
  const size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * size).find((candidate) => candidate >= raw * 0.999);
  const ticks = [];
  for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-9; tick += step) ticks.push(Number(tick.toPrecision(12)));
  return ticks;
}

function logTicks(low, high) {
  for (const factors of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 6, 8]]) {
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const factor of factors) {
        const tick = Number((factor * 10 ** power).toPrecision(6));
        if (tick >= low && tick <= high) ticks.push(tick);
      }
    if (ticks.length >= 3) return ticks;
  }
  return niceTicks(low, high, 4);
}

class Chart {
  constructor(spec, place) {
    this.spec = spec;
    this.legend = element("ul", { class: "legend" });
    this.svg = drawn("svg", { tabindex: 0, role: "img" });
    this.svg.setAttribute("aria-label", `${spec.title}: ${spec.curves.map((curve) => `${curve.name} ${inWords(this.last(curve)[1])} at the last step`).join(", ")}`);
    place.append(element("div", { class: "chart" }, element("h3", {}, spec.title), element("p", { class: "note" }, spec.note), this.legend, this.svg));
    this.steps = [...new Set(spec.curves.flatMap((curve) => curve.points.map((point) => point[0])))].sort((a, b) => a - b);
    this.at = null;
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerdown", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.read(null));
    this.svg.addEventListener("blur", () => this.read(null));
    this.svg.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(this.svg.parentElement);
    this.draw();
  }

  last(curve) {
    return curve.points.findLast((point) => point[1] !== null) || [0, null];
  }

  range() {
    const { spec } = this;
    const values = spec.curves.flatMap((curve) => curve.points.map((point) => point[1])).filter((value) => value !== null);
    for (const line of spec.lines) values.push(line.y);
    let low = Math.min(...values);
    let high = Math.max(...values);
    if (spec.log) return low === high ? [low / 1.5, high * 1.5] : [low / (high / low) ** 0.05, high * (high / low) ** 0.05];
    if (spec.zero) low = Math.min(low, 0);
    if (spec.zone) high = Math.max(high, spec.zone.below * 1.6);
    if (low === high) high = low + (Math.abs(low) || 1);
    const margin = (high - low) * 0.06;
    return [low < 0 || !spec.zero ? low - margin : low, high + margin];
  }

  draw() {
    const { spec, svg } = this;
    const width = Math.max(svg.parentElement.clientWidth, 200);
    if (width === this.width) return;
    this.width = width;
    const height = clamp(Math.round(width * 0.5), 190, 250);
    const left = 52, right = 14, top = 8, bottom = 26;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.replaceChildren();
    const [low, high] = this.range();
    const lastStep = this.steps.at(-1) || 1;
    const firstStep = Math.min(this.steps[0], lastStep - 1);
    this.x = (step) => left + ((step - firstStep) / (lastStep - firstStep)) * (width - left - right);
    const share = spec.log ? (value) => Math.log(value / low) / Math.log(high / low) : (value) => (value - low) / (high - low);
    this.y = (value) => height - bottom - share(value) * (height - top - bottom);
    for (const tick of spec.log ? logTicks(low, high) : niceTicks(low, high, 5)) {
      const y = this.y(tick);
      svg.append(drawn("line", { class: "grid", x1: left, x2: width - right, y1: y, y2: y }));
      svg.append(drawn("text", { x: left - 7, y: y + 4, "text-anchor": "end" }, inWords(tick)));
    }
    const ticks = niceTicks(firstStep, lastStep, width < 400 ? 4 : 6).filter(Number.isInteger);
    ticks.forEach((tick, index) => svg.append(drawn("text", { x: this.x(tick), y: height - 6, "text-anchor": "middle" }, index === 0 ? `step ${thousands(tick)}` : thousands(tick))));
    if (spec.zone && !spec.log && spec.zone.below > 0) {
      const y = this.y(spec.zone.below);
      svg.append(drawn("rect", { class: "zone", x: left, y, width: width - left - right, height: Math.max(0, height - bottom - y) }));
      svg.append(drawn("text", { class: "zone-name", x: width - right - 4, y: y - 4, "text-anchor": "end" }, spec.zone.name));
    }
    for (const line of spec.lines) svg.append(drawn("line", { class: "reference", x1: left, x2: width - right, y1: this.y(line.y), y2: this.y(line.y) }));
    for (const curve of spec.curves) this.drawCurve(curve);
    this.cursor = drawn("g", {});
    svg.append(this.cursor);
    this.read(this.at);
  }

  drawCurve(curve) {
    let path = "";
    let open = false;
    for (const [step, value] of curve.points) {
      if (value === null) { open = false; continue; }
      path += `${open ? "L" : "M"}${this.x(step).toFixed(1)} ${this.y(value).toFixed(1)}`;
      open = true;
    }
    const style = { d: path, fill: "none", stroke: colourOf(curve), "stroke-width": curve.faint ? 1 : 2, "stroke-linejoin": "round" };
    if (curve.faint) style.opacity = 0.4;
    if (curve.colour >= COLOURS) style["stroke-dasharray"] = "6 3";
    this.svg.append(drawn("path", style));
    const dots = curve.dots && curve.points.length <= 60 ? curve.points : curve.points.length === 1 ? curve.points : [];
    for (const [step, value] of dots) if (value !== null) this.svg.append(drawn("circle", { cx: this.x(step), cy: this.y(value), r: 2.6, fill: colourOf(curve) }));
  }

  point(event) {
    const box = this.svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * this.width;
    const near = this.steps.reduce((best, step) => (Math.abs(this.x(step) - x) < Math.abs(this.x(best) - x) ? step : best), this.steps[0]);
    this.read(near);
  }

  key(event) {
    const change = { ArrowLeft: -1, ArrowRight: 1, Home: -this.steps.length, End: this.steps.length }[event.key];
    if (change === undefined) return;
    event.preventDefault();
    const now = this.at === null ? this.steps.length - 1 : this.steps.indexOf(this.at);
    this.read(this.steps[clamp(now + change, 0, this.steps.length - 1)]);
  }

  // The point of a curve at a step, or the nearest measured one before it.
  valueAt(curve, step) {
    return curve.points.findLast((point) => point[0] <= step) || [step, null];
  }

  read(step) {
    this.at = step;
    this.cursor.replaceChildren();
    const items = [];
    if (step !== null) {
      this.cursor.append(drawn("line", { class: "cursor", x1: this.x(step), x2: this.x(step), y1: 8, y2: this.y.call(this, this.range()[0]) }));
      items.push(element("li", {}, "step ", element("b", {}, thousands(step))));
    }
    for (const curve of this.spec.curves) {
      const [at, value] = step === null ? this.last(curve) : this.valueAt(curve, step);
      const item = element("li", {}, element("span", { class: `swatch${curve.colour >= COLOURS ? " dash1" : ""}`, style: `--colour: ${colourOf(curve)}` }), `${curve.name} `, element("b", {}, inWords(value)));
      if (curve.faint) item.firstChild.style.opacity = 0.4;
      items.push(item);
      if (step !== null && value !== null) this.cursor.append(drawn("circle", { cx: this.x(at), cy: this.y(value), r: 4, fill: colourOf(curve) }));
    }
    for (const line of this.spec.lines) items.push(element("li", {}, element("span", { class: "swatch reference" }), `${line.name} `, element("b", {}, inWords(line.y))));
    this.legend.replaceChildren(...items);
  }
}

// ---- slices ----

class Picture {
  // `slices`: how many there are to choose from; the sprite may hold fewer of them.
  constructor(sprite, slices, aspect, kind = "") {
    this.sprite = sprite;
    this.slices = slices;
    this.canvas = element("canvas", { width: sprite.width, height: sprite.height, tabindex: 0, role: "img" });
    this.canvas.style.aspectRatio = String(aspect);
    this.box = element("div", { class: `picture ${kind}` }, this.canvas);
    this.slice = 0;
    this.image = new Image();
    this.image.addEventListener("load", () => this.show(this.slice));
    this.image.src = sprite.source;
  }

  show(slice) {
    this.slice = slice;
    const stored = this.slices > 1 ? Math.round((slice * (this.sprite.slices - 1)) / (this.slices - 1)) : 0;
    const { width, height } = this.sprite;
    if (this.image.complete && this.image.naturalWidth) this.canvas.getContext("2d").drawImage(this.image, 0, stored * height, width, height, 0, 0, width, height);
  }

  // The wheel belongs to the page until the picture is clicked.
  listen(move) {
    this.canvas.addEventListener("pointerdown", () => this.canvas.focus());
    this.canvas.addEventListener("wheel", (event) => {
      if (document.activeElement !== this.canvas || event.deltaY === 0) return;
      event.preventDefault();
      move(Math.sign(event.deltaY));
    }, { passive: false });
    this.canvas.addEventListener("keydown", (event) => {
      const change = { ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, ArrowRight: 1, PageUp: -5, PageDown: 5 }[event.key];
      if (event.key === "Escape") this.canvas.blur();
      if (change === undefined) return;
      event.preventDefault();
      move(change);
    });
  }
}

function slider(name, slices, onInput) {
  const input = element("input", { type: "range", min: 0, max: slices - 1, step: 1, "aria-label": name });
  const output = element("output");
  input.addEventListener("input", () => onInput(Number(input.value)));
  return { input, output, label: element("label", { class: "slider" }, name, input, output) };
}

function figure(picture, title, note, ...more) {
  const caption = element("figcaption", {}, title);
  if (note) caption.append(element("span", {}, note));
  picture.canvas.setAttribute("aria-label", `${title}. ${note || ""}`);
  return element("figure", {}, picture.box, caption, ...more);
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;

class Pair {
  // One depth t in the shared region, 0 to 1 along the body, places the slice of every picture.
  constructor(spec, networks, place) {
    this.views = spec.views.map((view, number) => {
      const picture = new Picture(view.sprite, view.slices, view.aspect, `v${number + 1}`);
      const [left, top, width, height] = view.region;
      picture.region = element("div", { class: "region" }, element("i"));
      Object.assign(picture.region.style, { left: `${100 * left}%`, top: `${100 * top}%`, width: `${100 * width}%`, height: `${100 * height}%` });
      Object.assign(picture.region.firstChild.style, { left: `${100 * view.mark[0]}%`, top: `${100 * view.mark[1]}%` });
      picture.box.append(picture.region);
      const depth = { at: (t) => view.depth[0] + t * view.depth[1], of: (slice) => (slice + 0.5 - view.depth[0]) / view.depth[1] };
      const control = slider(`Slice of view ${number + 1}`, view.slices, (slice) => this.show(depth.of(slice)));
      control.label.firstChild.remove();
      picture.listen((change) => this.show(depth.of(clamp(picture.slice + change, 0, view.slices - 1))));
      return { ...view, picture, depth, control };
    });
    const shared = spec.shared.map((sprite, number) => new Picture(sprite, sprite.slices, spec.aspect, `v${number + 1}`));
    const difference = new Picture(spec.difference, spec.difference.slices, spec.aspect);
    const features = spec.features.map((sprites) => sprites.map((sprite, number) => new Picture(sprite, sprite.slices, spec.aspect, `v${number + 1}`)));
    this.aligned = [...shared, difference, ...features.flat()];
    const slices = spec.shared[0].slices;
    for (const picture of this.aligned) picture.listen((change) => this.show((clamp(Math.floor(clamp(this.t, 0, 0.9999) * picture.slices) + change, 0, picture.slices - 1) + 0.5) / picture.slices));
    this.control = slider("Depth in the shared region", slices, (slice) => this.show((slice + 0.5) / slices));
    place.append(
      element("div", { class: "pair" },
        element("h3", {}, spec.name),
        element("p", { class: "note" }, `The shared region is ${spec.size_mm.join(" × ")} mm (D × H × W).`),
        this.control.label,
        element("div", { class: "row" },
          ...this.views.map((view, number) => figure(view.picture, `View ${number + 1}`, view.note, view.control.label)),
          ...shared.map((picture, number) => figure(picture, `Shared, from view ${number + 1}`)),
          figure(difference, "Difference", `white 0, full colour ±200 HU; ${spec.difference_hu.toFixed(0)} HU on average`)),
        element("div", { class: "row features" },
          ...features.flatMap((pictures, network) => pictures.map((picture, number) => figure(picture, `Features ${networks[network]}, view ${number + 1}`, `${percent(spec.matched[network])} of this pair matched`))))));
    this.show(0.5);
  }

  show(t) {
    this.t = t;
    const inside = clamp(t, 0, 0.9999);
    const { input, output } = this.control;
    input.value = Math.floor(inside * (Number(input.max) + 1));
    output.textContent = t < 0 || t > 1 ? "outside of it" : `slice ${Number(input.value) + 1} of ${Number(input.max) + 1}`;
    for (const picture of this.aligned) picture.show(Math.floor(inside * picture.slices));
    for (const view of this.views) {
      const slice = clamp(Math.floor(view.depth.at(t)), 0, view.slices - 1);
      view.picture.show(slice);
      const where = view.depth.of(slice);
      const half = Math.abs(0.5 / view.depth[1]);
      view.picture.region.classList.toggle("outside", where + half <= 0 || where - half >= 1);
      view.control.input.value = slice;
      view.control.output.textContent = `slice ${slice + 1} of ${view.slices}`;
    }
  }
}

function showSlab(spec, networks, place) {
  const pictures = [spec.ct, ...spec.features].map((sprite) => new Picture(sprite, sprite.slices, spec.aspect));
  const slices = spec.features[0].slices;
  const show = (slice) => {
    for (const picture of pictures) picture.show(slice);
    control.input.value = slice;
    control.output.textContent = `slice ${slice + 1} of ${slices}`;
  };
  const control = slider("Slice of the features", slices, show);
  for (const picture of pictures) {
    picture.slices = slices;
    picture.listen((change) => show(clamp(picture.slice + change, 0, slices - 1)));
  }
  const titles = ["CT", ...networks.map((network) => `Features ${network}`)];
  place.append(element("h3", {}, spec.name), control.label, element("div", { class: "row three" }, ...pictures.map((picture, number) => figure(picture, titles[number]))));
  show(Math.floor(slices / 2));
}

for (const chart of data.charts) new Chart(chart, document.querySelector(".charts"));
for (const pair of data.pairs) new Pair(pair, data.networks, document.querySelector("div.pairs"));
if (data.slab) showSlab(data.slab, data.networks, document.querySelector("div.slab"));
document.documentElement.dataset.ready = "true";
