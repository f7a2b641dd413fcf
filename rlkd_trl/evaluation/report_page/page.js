"use strict";
// Text from runs is only ever set as `textContent`: it is shown, never interpreted.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

function element(name, properties = {}, children = []) {
  const made = document.createElement(name);
  Object.assign(made, properties);
  made.append(...children);
  return made;
}

function svgElement(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// --- Curves

const colourOf = (run) => `var(--run${data.runs.indexOf(run) % 6})`;
const shown = (number) => (number === null ? "not finite" : String(number));
const tickText = (tick) => (tick !== 0 && Math.abs(tick) < 1e-3 ? tick.toExponential() : String(tick));
const BOX = { left: 58, right: 318, top: 10, bottom: 140, width: 326, height: 162 };

// Exponential moving average without a bias towards 0 at the start, as TensorBoard's.
function smoothed(points, weight) {
  let sum = 0, total = 0;
  return points.map(([step, value]) => {
    if (value === null) return [step, null];
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return [step, sum / total];
  });
}

function pathOf(points, x, y) {
  let command = "M";
  let path = "";
  points.forEach(([step, value], i) => {
    if (value === null) { command = "M"; return; } // a gap
    path += `${command}${x(step).toFixed(1)},${y(value).toFixed(1)}`;
    const isAlone = command === "M" && (i + 1 === points.length || points[i + 1][1] === null);
    if (isAlone) path += "h0.01"; // with round caps, a dot
    command = "L";
  });
  return path;
}

function drawChart(figure, chart) {
  const { left, right, top, bottom, width, height } = BOX;
  const series = Object.entries(chart.series);
  const steps = [...new Set(series.flatMap(([, points]) => points.map(([step]) => step)))].sort((a, b) => a - b);
  const first = steps[0], last = steps[steps.length - 1];
  const x = (step) => left + ((right - left) * (step - first)) / (last - first || 1);
  const y = (value) => bottom - ((bottom - top) * (value - chart.low)) / (chart.high - chart.low);
  const svg = svgElement("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: "0" });
  svg.setAttribute("aria-label", `${chart.name}, steps ${first} to ${last}. Arrow keys read the values.`);
  const write = (text, at) => { const made = svgElement("text", at); made.textContent = text; svg.append(made); };
  for (const tick of chart.ticks) {
    svg.append(svgElement("line", { class: "grid", x1: left, x2: right, y1: y(tick), y2: y(tick) }));
    write(tickText(tick), { x: left - 6, y: y(tick) + 4, "text-anchor": "end" });
  }
  write(String(first), { x: left, y: height - 6 });
  write(`step ${last}`, { x: right, y: height - 6, "text-anchor": "end" });
  const curves = series.map(([run, points]) => {
    const style = { style: `stroke: ${colourOf(run)}`, "stroke-linecap": "round" };
    const raw = svgElement("path", { ...style, d: pathOf(points, x, y) });
    const smooth = svgElement("path", style);
    svg.append(raw, smooth);
    return { points, raw, smooth };
  });
  const cursor = svgElement("line", { class: "cursor", y1: top, y2: bottom, visibility: "hidden" });
  svg.append(cursor);
  const output = element("output");
  figure.append(svg, output);

  const values = series.map(([run, points]) => [run, new Map(points)]);
  let current = -1;
  function read(index) {
    current = Math.min(Math.max(index, 0), steps.length - 1);
    const step = steps[current];
    for (const [name, value] of [["x1", x(step)], ["x2", x(step)], ["visibility", "visible"]]) cursor.setAttribute(name, value);
    const parts = values.filter(([, at]) => at.has(step)).map(([run, at]) => (data.runs.length > 1 ? `${run}: ` : "") + shown(at.get(step)));
    output.textContent = `step ${step}: ${parts.join("; ")}`;
  }
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * width;
    let nearest = 0;
    steps.forEach((step, i) => { if (Math.abs(x(step) - at) < Math.abs(x(steps[nearest]) - at)) nearest = i; });
    read(nearest);
  });
  svg.addEventListener("focus", () => { if (current < 0) read(steps.length - 1); });
  svg.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: steps.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    read(to);
  });
  return (weight) => {
    for (const { points, raw, smooth } of curves) {
      raw.setAttribute("class", weight ? "raw" : "");
      smooth.setAttribute("d", weight ? pathOf(smoothed(points, weight), x, y) : "");
    }
  };
}

function drawCharts() {
  const figures = [...document.querySelectorAll("figure.chart")];
  const all = data.groups.flatMap((group) => group.charts);
  const smooth = figures.map((figure, i) => drawChart(figure, all[i]));
  const slider = byId("smoothing");
  if (slider) slider.addEventListener("input", () => smooth.forEach((draw) => draw(Number(slider.value))));
  if (data.runs.length > 1 && byId("legend"))
    for (const run of data.runs) {
      const key = element("span", { className: "key" });
      key.style.background = colourOf(run);
      byId("legend").append(key, run);
    }
}

// --- Completions

const VALUES = {
  reward: "reward", q: "q", V: "V", advantage: "advantage",
  teacher_logp: "teacher's log-prob", student_logp: "student's log-prob",
};
const PER_PAGE = 20;

function explore(completions) {
  const numbers = (field) => completions.flatMap((one) => one[field] || []).filter((value) => value !== null);
  const fields = Object.keys(VALUES).filter((field) => completions.some((one) => one[field]));
  byId("colour").append(...fields.map((field) => element("option", { value: field, textContent: VALUES[field] })));

  // Prompts that recur are those held out; all others are of rollouts.
  const heldOut = [...new Set(completions.filter((one) => one.kind === "held-out").map((one) => one.prompt))];
  const kinds = [["", "all"]];
  if (heldOut.length) kinds.push(["held-out", "held-out, all"]);
  heldOut.forEach((prompt, i) => kinds.push([`prompt ${i}`, `held-out ${i + 1}: ${prompt.slice(0, 40)}`]));
  if (completions.some((one) => one.kind === "rollout")) kinds.push(["rollout", "of training rollouts"]);
  byId("kind").append(...kinds.map(([value, textContent]) => element("option", { value, textContent })));
  if (heldOut.length) byId("kind").value = "prompt 0";
  if (byId("run"))
    byId("run").append(...["", ...data.runs].map((run) => element("option", { value: run, textContent: run || "all" })));
  const searched = completions.map((one) => `${one.prompt}\n${one.text}`.toLowerCase());
  const order = completions.map((_, i) => i);
  let page = 0, found = [], range = [0, 1], field = fields[0];

  function setScale() {
    field = byId("colour").value;
    const sorted = Float64Array.from(numbers(field)).sort();
    const at = (share) => sorted[Math.round(share * (sorted.length - 1))] || 0;
    range = [at(0.05), at(0.95)];
    const [low, high] = range;
    byId("scale").replaceChildren(...[low, (low + high) / 2, high].flatMap((value) => [swatch(value), " "]));
  }
  function background(value) {
    const [low, high] = range;
    const share = Math.min(Math.max((value - low) / (high - low || 1), 0), 1) * 2 - 1; // −1 lowest, 1 highest
    return `rgb(var(${share < 0 ? "--low" : "--high"}) / ${(Math.abs(share) * 0.55).toFixed(2)})`;
  }
  function swatch(value) {
    const made = element("span", { className: "swatch", textContent: value.toPrecision(3) });
    made.style.background = background(value);
    return made;
  }

  function select() {
    const text = byId("search").value.toLowerCase(), kind = byId("kind").value, ended = byId("ended").value;
    const run = byId("run") ? byId("run").value : "";
    const prompt = kind.startsWith("prompt ") ? heldOut[Number(kind.slice(7))] : null;
    found = order.filter((i) => {
      const one = completions[i];
      return (
        (!text || searched[i].includes(text)) && (!run || one.run === run) && (!ended || String(one.ended) === ended) &&
        (!kind || (prompt === null ? one.kind === kind : one.kind === "held-out" && one.prompt === prompt))
      );
    });
    const key = { step: (one) => one.step, total: (one) => one.total ?? -Infinity, length: (one) => one.tokens.length }[byId("sort").value];
    const sign = byId("descending").checked ? -1 : 1;
    found.sort((a, b) => sign * (key(completions[a]) - key(completions[b])) || a - b);
    page = 0;
    draw();
  }

  function draw() {
    const pages = Math.max(Math.ceil(found.length / PER_PAGE), 1);
    byId("found").textContent = `${found.length} of ${completions.length} texts`;
    byId("page").textContent = `page ${page + 1} of ${pages}`;
    byId("previous").disabled = page === 0;
    byId("next").disabled = page + 1 >= pages;
    byId("token").textContent = "";
    let before = null;
    byId("list").replaceChildren(
      ...found.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map((i) => {
        const isNew = completions[i].prompt !== before;
        before = completions[i].prompt;
        return card(completions[i], isNew);
      }),
    );
  }

  function card(one, withPrompt) {
    const facts = [
      one.by === "teacher" ? "teacher" : `student, step ${one.step}`,
      one.run && data.runs.length > 1 ? one.run : "",
      one.total == null ? "" : `reward ${one.total.toPrecision(5)}`,
      `${one.tokens.length} tokens`,
      one.ended ? "ends with EOS" : "cut off",
    ].filter(Boolean);
    const parts = [element("header", {}, facts.map((fact) => element("span", { textContent: fact })))];
    if (withPrompt) {
      const rows = [["prompt", one.prompt], ...(one.references || []).map((text) => ["reference", text])];
      parts.push(element("dl", { dir: "auto" }, rows.flatMap(([name, text]) => [element("dt", { textContent: name }), element("dd", { textContent: text, dir: "auto" })])));
    }
    parts.push(tokensOf(one));
    return element("article", { className: "completion" }, parts);
  }

  function tokensOf(one) {
    const spans = one.tokens.map((token, t) => {
      const span = element("span", { textContent: token });
      const value = one[field] && one[field][t];
      if (value != null) span.style.background = background(value);
      return span;
    });
    const holder = element("p", { className: "tokens", tabIndex: 0, dir: "auto" }, spans);
    holder.setAttribute("role", "group");
    holder.setAttribute("aria-label", `${one.by}, step ${one.step}: ${one.text}`);
    let current = 0;
    function read(t) {
      spans[current]?.classList.remove("current");
      current = Math.min(Math.max(t, 0), spans.length - 1);
      if (!spans.length) return;
      spans[current].classList.add("current");
      const parts = fields.filter((name) => one[name]).map((name) => `${VALUES[name]} ${shown(one[name][current])}`);
      byId("token").textContent = `“${one.tokens[current]}”  ${parts.join("   ")}`;
    }
    holder.addEventListener("focus", () => read(current));
    holder.addEventListener("blur", () => spans[current]?.classList.remove("current"));
    holder.addEventListener("pointerover", (event) => { const t = spans.indexOf(event.target); if (t >= 0) read(t); });
    holder.addEventListener("keydown", (event) => {
      const to = { ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: spans.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      read(to);
    });
    return holder;
  }

  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("input", () => { setScale(); select(); });
  byId("previous").addEventListener("click", () => { page -= 1; draw(); });
  byId("next").addEventListener("click", () => { page += 1; draw(); });
  setScale();
  select();
}

drawCharts();
if (data.completions.length) explore(data.completions);
