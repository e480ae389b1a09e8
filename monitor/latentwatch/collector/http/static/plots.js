// Everything that is drawn: values in, SVG out. Plots stretch to the space that the style sheet gives them.

import { draw, setAttributes } from "./dom.js";
import { figure } from "./format.js";

/** @import { FeatureSeries, ShownFeature } from "./answers.d.ts" */

const STRETCHED = { preserveAspectRatio: "none", role: "img" };

/** Told whether it can be seen, by the plot's element. @type {WeakMap<Element, (seen: boolean) => void>} */
const watched = new WeakMap();
const sight = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) watched.get(target)?.(isIntersecting);
});

/**
 * A feature over time: a line per stretch of windows with values, a dashed limit, a dot on every window above it.
 *
 * Drawn anew only while it can be seen: the paths of the others would be garbage, megabytes a minute.
 */
export function sparkline() {
  const [base, area, line, bound, over] = ["base", "area", "line", "limit", "over"].map((name) =>
    draw("path", { class: name }),
  );
  const node = draw("svg", STRETCHED, base, area, line, bound, over);
  /** @type {Pick<FeatureSeries, "series" | "limit">} */
  let plotted = { series: [], limit: null };
  let drawn = "";
  let seen = true;
  const redraw = () => {
    const key = JSON.stringify(plotted);
    if (!seen || drawn === key) return;
    drawn = key;
    const paths = sparkPaths(plotted.series, plotted.limit);
    setAttributes(node, { viewBox: `0 0 ${plotted.series.length - 1 || 1} 34` });
    setAttributes(base, { d: paths.base });
    setAttributes(area, { d: paths.area });
    setAttributes(line, { d: paths.line });
    setAttributes(bound, { d: paths.limit });
    setAttributes(over, { d: paths.over });
  };
  watched.set(node, (now) => {
    seen = now;
    redraw();
  });
  sight.observe(node);
  /** @param {FeatureSeries} feature */
  const update = ({ series, limit, peak }) => {
    plotted = { series, limit };
    redraw();
    setAttributes(node, { "aria-label": `peak ${figure(peak)}, limit ${figure(limit)}` });
  };
  return { node, update };
}

/**
 * @param {(number | null)[]} series
 * @param {number | null} limit
 */
function sparkPaths(series, limit) {
  const values = series.filter((value) => value !== null);
  const top = Math.max(...values, limit ?? -Infinity);
  const bottom = Math.min(0, ...values, limit ?? Infinity);
  const span = top - bottom || 1;
  const width = series.length - 1 || 1;
  /** @param {number} value */
  const y = (value) => (32 - ((value - bottom) / span) * 28).toFixed(2);
  const base = `M0 ${y(Math.max(0, bottom))}H${width}`;
  const paths = { base, line: "", area: "", limit: limit === null ? "" : `M0 ${y(limit)}H${width}`, over: "" };
  for (const [from, to] of stretches(series)) {
    const points = [];
    for (let i = from; i <= to; i++) {
      const value = series[i] ?? 0;
      points.push(`${i} ${y(value)}`);
      if (limit !== null && value > limit) paths.over += `M${i} ${y(value)}h0`;
    }
    // A lone window has no neighbour to draw a line to.
    paths.line += `M${points.join("L")}${from === to ? "h1" : ""}`;
    paths.area += `M${from} ${y(bottom)}L${points.join("L")}L${to} ${y(bottom)}Z`;
  }
  return paths;
}

/** First and last index of each run of values. @param {(number | null)[]} series @returns {[number, number][]} */
function stretches(series) {
  /** @type {[number, number][]} */
  const found = [];
  series.forEach((value, i) => {
    if (value === null) return;
    const last = found.at(-1);
    if (last?.[1] === i - 1) last[1] = i;
    else found.push([i, i]);
  });
  return found;
}

/**
 * Tokens per window: those seen as an area, those missed as bars on it. The last window is not over and left out.
 * @param {SVGSVGElement} node
 */
export function trafficPlot(node) {
  const [base, area, line, lost] = ["base", "area", "line", "missed"].map((name) => draw("path", { class: name }));
  node.append(base, area, line, lost);
  /** @param {{ tokens_seen: number[], tokens_missed: number[] }} view */
  return ({ tokens_seen, tokens_missed }) => {
    const seen = tokens_seen.slice(0, -1);
    const missed = tokens_missed.slice(0, -1);
    const top = Math.max(1, ...seen.map((value, i) => value + missed[i]));
    const width = seen.length - 1;
    /** @param {number} value */
    const y = (value) => (28 - (value / top) * 26).toFixed(2);
    const points = seen.map((value, i) => `${i} ${y(value)}`).join("L");
    setAttributes(node, { viewBox: `0 0 ${width} 30` });
    setAttributes(base, { d: `M0 28H${width}` });
    setAttributes(area, { d: `M${points}L${width} 28H0Z` });
    setAttributes(line, { d: `M${points}` });
    setAttributes(lost, { d: missed.map((value, i) => (value ? `M${i} 28V${y(value)}` : "")).join("") });
  };
}

/**
 * Evidence against its limit, which is at four fifths.
 * @param {number} value
 * @param {number} limit
 */
export function meter(value, limit) {
  const filled = Math.max(0, Math.min(1, value / limit / 1.25));
  const label = `evidence ${figure(value)}, limit ${figure(limit)}`;
  return draw(
    "svg",
    { ...STRETCHED, viewBox: "0 0 100 10", "aria-label": label },
    draw("rect", { class: "track", x: 0, y: 2, width: 100, height: 6 }),
    draw("rect", { class: value > limit ? "fill alarm" : "fill", x: 0, y: 2, width: 100 * filled, height: 6 }),
    draw("line", { class: "limit", x1: 80, x2: 80, y1: 0, y2: 10 }),
  );
}

/**
 * A request from its first token to its last, with a mark where each feature exceeded its limit most.
 * @param {ShownFeature[]} features
 * @param {number} prompt tokens
 * @param {number | null} tokens of the whole request, where they are known
 */
export function exceededPositions(features, prompt, tokens) {
  const total = Math.max(tokens ?? 0, prompt, ...features.map((feature) => feature.position + 1), 1);
  const label = "Positions at which features exceeded their limits";
  const marks = features
    .filter((feature) => feature.exceeded)
    .map((feature) => (feature.statistic_position ?? feature.position) + 0.5)
    .map((x) => draw("line", { class: "at", x1: x, x2: x, y1: 2, y2: 32 }));
  return draw(
    "svg",
    { ...STRETCHED, viewBox: `0 0 ${total} 34`, "aria-label": label },
    draw("rect", { class: "prompt", x: 0, y: 8, width: prompt, height: 18 }),
    draw("rect", { class: "output", x: prompt, y: 8, width: total - prompt, height: 18 }),
    ...marks,
  );
}
