// A request token by token: for each feature a strip with its activations, what its limit compares, and a word on the
// token under the pointer.

import { statisticOf } from "./catalogue.js";
import { draw, make, setAttributes, setText } from "./dom.js";
import { count, figure } from "./format.js";
import { featureLink } from "./links.js";
import { scaleOf, tokensOf } from "./statistic.js";

/** @import { FeatureTotals, StoredActivations, StoredRequest } from "./answers.d.ts" */
/** @import { Token } from "./statistic.js" */

const STRIPS_SHOWN = 12;
/** Beyond as many tokens a column is the strongest of several. */
const MOST_COLUMNS = 640;
const HEIGHT = 30;

/**
 * @param {StoredRequest} request with its activations
 * @param {Map<string, FeatureTotals>} catalogue
 */
export function tokenByToken(request, catalogue) {
  const ends = request.activations.flatMap((found) => found.positions.map((position) => position + 1));
  const total = Math.max(request.total_tokens ?? 0, ...ends, 1);
  const prompt = request.prompt_tokens ?? 0;
  const strips = request.activations
    .slice(0, STRIPS_SHOWN)
    .map((found) => strip(found, catalogue, tokensOf(found, catalogue.get(found.feature), total, prompt), prompt));
  return make(
    "div",
    { className: "strips" },
    make("h3", {}, "Token by token"),
    legend(total, prompt),
    ...strips,
    ...cautions(request).map((words) => make("p", { className: "note" }, words)),
  );
}

/** @param {StoredRequest} request */
function cautions({ activations, activations_lost, tokens }) {
  const said = ["The first token sets no scale: models park there what they do not need, far above all other tokens."];
  if (activations.length > STRIPS_SHOWN)
    said.push(`${activations.length - STRIPS_SHOWN} further features are left out.`);
  if (activations_lost) said.push(`${count(activations_lost)} activations before the first exceedance were not kept.`);
  if ((tokens.unseen ?? 0) + (tokens.dropped ?? 0) > 0) {
    said.push(
      "Not every token was seen: where one is missing, a mean of a feature that rarely fires may be drawn too low.",
    );
  }
  return said;
}

/**
 * @param {number} total
 * @param {number} prompt
 */
function legend(total, prompt) {
  const entries = [
    ["cell", "activation"],
    ["cell over", "above the limit"],
    ["cell apart", "not counted by the limit"],
    ["mean", "mean that the limit is on"],
    ["limit", "limit"],
  ].map(([className, words]) => {
    const mark =
      className === "mean" || className === "limit"
        ? draw("line", { class: className, x1: 0, x2: 14, y1: 6, y2: 6 })
        : draw("rect", { class: className, x: 1, y: 1, width: 12, height: 10 });
    return make("span", {}, draw("svg", { viewBox: "0 0 14 12", "aria-hidden": "true" }, mark), words);
  });
  const parts = `${count(prompt)} of the prompt, the output behind the line`;
  const words = `One column a token, ${count(total)} in all: ${parts}.`;
  return make("div", { className: "strip-legend" }, make("p", { className: "note" }, words), make("p", {}, ...entries));
}

/**
 * @param {StoredActivations} found
 * @param {Map<string, FeatureTotals>} catalogue
 * @param {Token[]} tokens
 * @param {number} prompt
 */
function strip(found, catalogue, tokens, prompt) {
  const statistic = statisticOf(catalogue, found.feature);
  const isMean = (catalogue.get(found.feature)?.limit?.window_tokens ?? 1) > 1;
  const scale = scaleOf(tokens, found.limit, found.dense);
  const best = tokens.reduce((most, token) =>
    (token.statistic ?? -Infinity) > (most.statistic ?? -Infinity) ? token : most,
  );
  const limit = found.limit === null ? "no limit" : `limit ${figure(found.limit)}`;
  const summary = `${statistic}: ${figure(best.statistic)} at token ${best.position}, ${limit}`;
  const said = make("output", { className: "readout" }, summary);
  const cursor = draw("line", { class: "cursor", y1: 0, y2: HEIGHT });
  cursor.style.display = "none";
  const svg = draw(
    "svg",
    {
      viewBox: `0 0 ${tokens.length} ${HEIGHT}`,
      preserveAspectRatio: "none",
      tabindex: 0,
      role: "slider",
      "aria-label": `${found.label || found.feature}, token`,
      "aria-valuemin": 0,
      "aria-valuemax": tokens.length - 1,
      "aria-valuenow": best.position,
      "aria-valuetext": summary,
    },
    draw("rect", { class: "track", x: 0, y: 0, width: tokens.length, height: HEIGHT }),
    ...columns(tokens, scale),
    ...(isMean ? [means(tokens, scale)] : []),
    ...(found.limit === null ? [] : [level(found.limit, scale, tokens.length)]),
    draw("line", { class: "split", x1: prompt, x2: prompt, y1: 0, y2: HEIGHT }),
    cursor,
  );
  let at = best.position;
  /** @param {number} position */
  const point = (position) => {
    at = Math.max(0, Math.min(tokens.length - 1, position));
    const words = tokenWords(tokens[at], prompt, isMean, found.dense);
    setText(said, words);
    cursor.style.display = "";
    setAttributes(cursor, { x1: at + 0.5, x2: at + 0.5 });
    setAttributes(svg, { "aria-valuenow": at, "aria-valuetext": words });
  };
  const leave = () => {
    setText(said, summary);
    cursor.style.display = "none";
  };
  svg.addEventListener("pointermove", (event) => {
    const { left, width } = svg.getBoundingClientRect();
    point(strongestNear(tokens, ((event.clientX - left) / width) * tokens.length, tokens.length / width));
  });
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: tokens.length - 1 };
    const to = steps[/** @type {keyof typeof steps} */ (event.key)];
    if (to === undefined) return;
    event.preventDefault();
    point(to);
  });
  const name = featureLink(found.feature, make("span", {}, found.label || found.feature));
  return make("div", { className: "strip-row" }, name, said, svg);
}

/**
 * @param {Token} token
 * @param {number} prompt
 * @param {boolean} isMean
 * @param {boolean} dense
 */
function tokenWords({ position, value, statistic, counted, over }, prompt, isMean, dense) {
  const where = `token ${position} (${position < prompt ? "prompt" : "output"})`;
  const own = value === null ? (dense ? "not seen" : "no activation") : figure(value);
  const mean = isMean && statistic !== null ? `, mean ${figure(statistic)}` : "";
  return `${where}: ${own}${mean}${over ? ", above the limit" : ""}${counted ? "" : ", not counted by the limit"}`;
}

/**
 * Of the tokens under one pixel the strongest, so that a lone one can be found.
 * @param {Token[]} tokens
 * @param {number} place
 * @param {number} wide tokens a pixel
 */
function strongestNear(tokens, place, wide) {
  const under = tokens.slice(Math.max(0, Math.floor(place)), Math.floor(place + Math.max(wide, 0.001)) + 1);
  return (
    under.reduce((most, token) => ((token.value ?? -Infinity) > (most.value ?? -Infinity) ? token : most), under[0])
      ?.position ?? tokens.length - 1
  );
}

/**
 * A bar a column: height and shade say its strength, so that it is read without telling colours apart.
 * @param {Token[]} tokens
 * @param {{ bottom: number, top: number }} scale
 */
function columns(tokens, scale) {
  const wide = Math.ceil(tokens.length / MOST_COLUMNS);
  const bars = [];
  for (let x = 0; x < tokens.length; x += wide) {
    const under = tokens.slice(x, x + wide).filter(({ value }) => value !== null);
    if (!under.length) continue;
    const most = under.reduce((best, token) => ((token.value ?? 0) > (best.value ?? 0) ? token : best));
    const strength = Math.max(0, Math.min(1, ((most.value ?? 0) - scale.bottom) / (scale.top - scale.bottom)));
    const height = Math.max(2, (HEIGHT - 2) * strength);
    const kind = under.some(({ over }) => over) ? "cell over" : most.counted ? "cell" : "cell apart";
    const box = { x, y: HEIGHT - height, width: wide, height, "fill-opacity": (0.35 + 0.65 * strength).toFixed(2) };
    bars.push(draw("rect", { class: kind, ...box }));
  }
  return bars;
}

/**
 * The mean of the window that ends at each token.
 * @param {Token[]} tokens
 * @param {{ bottom: number, top: number }} scale
 */
function means(tokens, scale) {
  let path = "";
  tokens.forEach(({ statistic, position }, i) => {
    if (statistic === null) return;
    path += `${tokens[i - 1]?.statistic == null ? "M" : "L"}${position + 0.5} ${heightOf(statistic, scale)}`;
  });
  return draw("path", { class: "mean", d: path });
}

/**
 * @param {number} limit
 * @param {{ bottom: number, top: number }} scale
 * @param {number} width
 */
function level(limit, scale, width) {
  const y = heightOf(limit, scale);
  return draw("line", { class: "limit", x1: 0, x2: width, y1: y, y2: y });
}

/**
 * @param {number} value
 * @param {{ bottom: number, top: number }} scale
 */
function heightOf(value, { bottom, top }) {
  const strength = Math.max(0, Math.min(1, (value - bottom) / (top - bottom)));
  return (HEIGHT - (HEIGHT - 2) * strength).toFixed(2);
}
