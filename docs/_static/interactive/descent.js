// The interactive page: it draws runs of gdopt from runs.js, which docs/_ext/interactive.py writes. It needs no library
// and no network.
(function () {
  "use strict";

  const runs = window.gdoptRuns;
  const byId = (id) => document.getElementById(id);
  const FRAME = 125; // milliseconds between two pictures
  const FRAMES = 90; // the most pictures of a run; long runs skip steps
  const FIRST = { rate: 0.1, step: 5 };
  const BEYOND = 20; // widths of a picture after which a path is cut
  const EDGE = 8; // the distance of a ball from the edge if its point is outside

  const state = { rate: nearest(FIRST.rate), wanted: FIRST.step, timer: null };
  const still = window.matchMedia("(prefers-reduced-motion: reduce)");

  function nearest(rate) {
    const gaps = runs.rates.map((other) => Math.abs(other - rate));
    return gaps.indexOf(Math.min(...gaps));
  }

  // ---- drawing ----

  function add(parent, tag, attributes, text) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    parent.appendChild(element);
    return element;
  }

  // Axes in an svg element. `x` and `y` are [low, high], and map to pixels; `log` is for the heights.
  function makeAxes(svg, { x, y, log, xlabel, ylabel }) {
    const [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
    const box = { left: 58, right: width - 14, top: 12, bottom: height - 46 };
    const scale = log ? Math.log10 : (value) => value;
    const axes = { svg, box };
    axes.setHighest = (right, top) => ([x, y] = [[x[0], right], [y[0], top]]);
    axes.x = (value) => box.left + ((value - x[0]) / (x[1] - x[0])) * (box.right - box.left);
    axes.y = (value) =>
      box.bottom - ((scale(value) - scale(y[0])) / (scale(y[1]) - scale(y[0]))) * (box.bottom - box.top);
    const id = svg.id + "-clip";
    const clip = add(add(svg, "defs", {}), "clipPath", { id });
    const frame = { x: box.left, y: box.top, width: box.right - box.left, height: box.bottom - box.top };
    add(clip, "rect", frame);
    add(svg, "rect", { ...frame, class: "gd-frame" });
    axes.ticks = add(svg, "g", {});
    axes.inside = add(svg, "g", { "clip-path": `url(#${id})` });
    add(svg, "text", { x: (box.left + box.right) / 2, y: height - 6, class: "gd-label" }, xlabel);
    const middle = (box.top + box.bottom) / 2;
    add(svg, "text", { x: 14, y: middle, transform: `rotate(-90 14 ${middle})`, class: "gd-label" }, ylabel);
    return axes;
  }

  function drawTicks(axes, xs, ys) {
    axes.ticks.replaceChildren();
    for (const value of xs) {
      const at = axes.x(value);
      add(axes.ticks, "line", { x1: at, x2: at, y1: axes.box.bottom, y2: axes.box.bottom + 5, class: "gd-tick" });
      const place = { x: at, y: axes.box.bottom + 20, class: "gd-number gd-x", "data-value": value };
      add(axes.ticks, "text", place, readable(value));
    }
    for (const value of ys) {
      const at = axes.y(value);
      add(axes.ticks, "line", { x1: axes.box.left - 5, x2: axes.box.left, y1: at, y2: at, class: "gd-tick" });
      const place = { x: axes.box.left - 8, y: at + 4, class: "gd-number gd-y", "data-value": value };
      add(axes.ticks, "text", place, readable(value));
    }
  }

  function line(axes, points) {
    const seen = [];
    const width = axes.box.right - axes.box.left;
    for (const [x, y] of points) {
      const [left, top] = [axes.x(x), axes.y(y)];
      seen.push(`${left.toFixed(2)},${top.toFixed(2)}`);
      if (Math.abs(left) > BEYOND * width || Math.abs(top) > BEYOND * width) break; // browsers draw no huge numbers
    }
    return seen.join(" ");
  }

  function place(axes, ball, x, y) {
    const [left, top] = [axes.x(x), axes.y(y)];
    const { box } = axes;
    const inside = left >= box.left && left <= box.right && top >= box.top && top <= box.bottom;
    ball.setAttribute("cx", Math.min(Math.max(left, box.left + EDGE), box.right - EDGE));
    ball.setAttribute("cy", Math.min(Math.max(top, box.top + EDGE), box.bottom - EDGE));
    if (inside) {
      ball.setAttribute("cx", left);
      ball.setAttribute("cy", top);
    }
    ball.classList.toggle("gd-outside", !inside);
    return inside;
  }

  function readable(value) {
    const size = Math.abs(value);
    const large = size >= 1e5 || (size > 0 && size < 1e-3);
    const text = large ? Number(value.toPrecision(2)).toExponential() : String(Number(value.toPrecision(4)));
    return text.replaceAll("-", "\u2212").replace("e+", "e");
  }

  // ---- the three pictures ----

  function path(axes, kind) {
    return {
      trail: add(axes.inside, "polyline", { class: `gd-trail gd-${kind}` }),
      dots: add(axes.inside, "g", { class: `gd-dots gd-${kind}` }),
      ball: add(axes.svg, "circle", { r: 8, class: `gd-ball gd-${kind}` }),
    };
  }

  function drawPath(axes, parts, points, step) {
    const past = points.slice(0, step + 1);
    parts.trail.setAttribute("points", line(axes, past));
    parts.dots.replaceChildren();
    for (const [x, y] of past.slice(0, 200)) {
      const [left, top] = [axes.x(x), axes.y(y)];
      const { box } = axes;
      if (left < box.left || left > box.right || top < box.top || top > box.bottom) continue;
      add(parts.dots, "circle", { cx: left, cy: top, r: 3 });
    }
    parts.ball.dataset.x = points[step][0];
    parts.ball.dataset.y = points[step][1];
    return place(axes, parts.ball, ...points[step]);
  }

  const valley = makeAxes(byId("gd-valley"), { x: runs.slopes, y: runs.losses, xlabel: "slope", ylabel: "loss" });
  drawTicks(valley, [-2, 0, 2, 4, 6], [0, 50, 100, 150, 200, 250]);
  add(valley.inside, "polyline", { class: "gd-loss", points: line(valley, runs.curve) });
  const onValley = path(valley, "one");

  const contour = makeAxes(byId("gd-contour"), { x: runs.slopes, y: runs.offsets, xlabel: "slope", ylabel: "offset" });
  drawTicks(contour, [-2, 0, 2, 4, 6], [-4, -2, 0, 2, 4, 6]);
  for (const level of runs.contours) {
    for (const part of level) add(contour.inside, "polyline", { class: "gd-level", points: line(contour, part) });
  }
  const onContour = path(contour, "two");

  const steepest = runs.one[0].losses[0];
  const lowest = Math.min(...runs.one.map((run) => Math.min(...run.losses)));
  const heights = [lowest / 2, steepest * 10]; // at least
  if (window.matchMedia("(max-width: 45rem)").matches) byId("gd-curve").setAttribute("viewBox", "0 0 420 260");
  const curve = makeAxes(byId("gd-curve"), { x: [0, 20], y: heights, log: true, xlabel: "step", ylabel: "loss" });
  const onCurve = {};
  for (const kind of ["one", "two"]) {
    onCurve[kind] = {
      whole: add(curve.inside, "polyline", { class: `gd-whole gd-${kind}` }),
      trail: add(curve.inside, "polyline", { class: `gd-trail gd-${kind}` }),
      ball: add(curve.svg, "circle", { r: 6, class: `gd-ball gd-${kind}` }),
    };
  }

  // ---- what is shown ----

  const steps = (run) => run.points.length - 1;
  const longest = () => Math.max(steps(runs.one[state.rate]), steps(runs.two[state.rate]));
  const shown = () => Math.min(state.wanted, longest());

  function drawCurve(step) {
    const width = [20, 50, 100, 200, 300].find((count) => count >= longest()) || longest();
    const losses = [...runs.one[state.rate].losses, ...runs.two[state.rate].losses];
    const top = Math.max(heights[1], 2 * Math.max(...losses));
    curve.setHighest(width, top);
    const between = Math.ceil(Math.log10(top / heights[0]) / 7); // powers of ten between two numbers
    const powers = Array.from({ length: 8 }, (_, index) => 10 ** (index * between - 1));
    const apart = width / 5;
    const marks = [0, 1, 2, 3, 4, 5].map((part) => part * apart);
    drawTicks(curve, marks, powers.filter((power) => power <= top));
    for (const kind of ["one", "two"]) {
      const run = runs[kind][state.rate];
      const points = run.losses.map((loss, index) => [index, loss]);
      const last = Math.min(step, steps(run));
      onCurve[kind].whole.setAttribute("points", line(curve, points));
      onCurve[kind].trail.setAttribute("points", line(curve, points.slice(0, last + 1)));
      place(curve, onCurve[kind].ball, ...points[last]);
      onCurve[kind].ball.dataset.x = last;
      onCurve[kind].ball.dataset.y = run.losses[last];
    }
  }

  function draw() {
    const step = shown();
    const [one, two] = [runs.one[state.rate], runs.two[state.rate]];
    const onOne = Math.min(step, steps(one));
    const onTwo = Math.min(step, steps(two));
    const balls = one.points.map((slope, index) => [slope, one.losses[index]]);
    const seen = [drawPath(valley, onValley, balls, onOne), drawPath(contour, onContour, two.points, onTwo)];
    drawCurve(step);

    const rate = String(runs.rates[state.rate]);
    byId("gd-rate").value = state.rate;
    byId("gd-rate").setAttribute("aria-valuetext", rate);
    byId("gd-rate-value").textContent = rate;
    byId("gd-step").max = longest();
    byId("gd-step").value = step;
    byId("gd-step").setAttribute("aria-valuetext", `${step} of ${longest()}`);
    byId("gd-step-value").textContent = `${step} of ${longest()}`;
    say("gd-caption", `Learning rate ${rate}. One weight: ${one.words}. Two weights: ${two.words}.`);
    say("gd-one", ending(one));
    say("gd-two", ending(two));

    const away = (inside) => (inside ? "" : " It is outside of the picture.");
    const [slope, offset] = two.points[onTwo].map(readable);
    describe(
      valley,
      `The ball is at slope ${readable(one.points[onOne])}, with the loss ${readable(one.losses[onOne])}, ` +
        `after ${onOne} steps.${away(seen[0])}`,
    );
    describe(contour, `The ball is at slope ${slope} and offset ${offset}, after ${onTwo} steps.${away(seen[1])}`);
    describe(
      curve,
      `After ${step} steps the loss is ${readable(one.losses[onOne])} with one weight, ` +
        `and ${readable(two.losses[onTwo])} with two.`,
    );
  }

  const ending = (run) => `${run.status}: ${run.message}`;
  const describe = (axes, text) => axes.svg.setAttribute("aria-label", text);

  // A live region is read aloud at each change, so it changes only with its text.
  function say(id, text) {
    if (byId(id).textContent !== text) byId(id).textContent = text;
  }

  // ---- controls ----

  function stop() {
    if (state.timer !== null) window.clearInterval(state.timer);
    state.timer = null;
    byId("gd-play").textContent = still.matches ? "To the end" : "Play";
  }

  function go(step) {
    state.wanted = Math.max(0, Math.min(step, longest()));
    draw();
  }

  function play() {
    if (state.timer !== null) return stop();
    if (still.matches) return go(longest()); // no motion
    if (shown() === longest()) go(0);
    byId("gd-play").textContent = "Pause";
    state.timer = window.setInterval(() => {
      go(shown() + Math.ceil(longest() / FRAMES));
      if (shown() === longest()) stop();
    }, FRAME);
  }

  byId("gd-rate").max = runs.rates.length - 1;
  byId("gd-rate").addEventListener("input", (event) => {
    state.rate = Number(event.target.value);
    draw(); // at the same step, so that the slider moves the ball
  });
  byId("gd-step").addEventListener("input", (event) => {
    stop();
    go(Number(event.target.value));
  });
  byId("gd-play").addEventListener("click", play);
  byId("gd-next").addEventListener("click", () => {
    stop();
    go(shown() + 1);
  });
  byId("gd-back").addEventListener("click", () => {
    stop();
    go(0);
  });
  still.addEventListener("change", stop);
  byId("gd-without").hidden = true;
  byId("gd-parts").hidden = false;
  stop();
  draw();
})();
