// The page itself: two verdicts, coverage, traffic, the features over time, the engines.

import { at, draw, liveList, make, setText } from "./dom.js";
import { showFlagged } from "./flagged.js";
import { ago, count, figure, share } from "./format.js";
import { featureLink, grafanaBoard, hashOf, showWays } from "./links.js";
import { sparkline, trafficPlot } from "./plots.js";

/** @import { Coverage, Engine, FeatureSeries, FeatureTotals, Links, Overview, Verdict } from "./answers.d.ts" */
/** @import { Row } from "./dom.js" */

/**
 * What was asked for: features from this rank on that match the search.
 * @typedef {{ first: number, search: string }} Question
 */

/** Features at a time. The collector ranks and searches, so that the browser holds one page of them. */
export const PAGE = 48;

const STATES = ["scored", "inherited", "unseen", "dropped"];
const ICONS = {
  ok: ["M13 1a12 12 0 1 0 0 24 12 12 0 0 0 0-24Z", "m8 13.5 3.5 3.5 7-7.5"],
  waiting: ["M13 1a12 12 0 1 0 0 24 12 12 0 0 0 0-24Z", "M8 13h.01M13 13h.01M18 13h.01"],
  attention: ["M13 1.5 25.5 24H.5Z", "M13 10v6M13 20h.01"],
  problem: ["M8 1h10l7 7v10l-7 7H8l-7-7V8Z", "m9 9 8 8M17 9l-8 8"],
};
const TITLE_MARKS = { ok: "", waiting: "", attention: "! ", problem: "✕ " };

const showWrong = verdictCard(at("wrong"));
const showSeen = verdictCard(at("seen"));
const showLegend = liveList(at("legend"), ([state]) => state, legendRow);
const showFigures = liveList(at("figures"), ([name]) => name, figureRow);
const showTraffic = trafficPlot(at("traffic-plot", SVGSVGElement));
const showRows = liveList(at("features"), (feature) => feature.feature, featureRow);
const showEngines = liveList(at("engines"), (engine) => engine.replica, engineRow);

/**
 * Shows one answer of the collector.
 * @param {Overview} view
 * @param {Question} question that it answers
 * @param {Map<string, FeatureTotals>} catalogue
 */
export function showOverview(view, question, catalogue) {
  setText(at("watchlist"), view.watchlist);
  setText(at("sha"), view.watchlist_sha256.slice(0, 12));
  showWrong(view.wrong);
  showSeen(view.seen);
  showCoverage(view.coverage);
  const { finished, aborted, lost } = view.requests;
  showFigures([
    ["tokens a second", Math.round(view.coverage.tokens_per_second)],
    ["open requests", view.open_requests],
    ["ended requests", finished + aborted + lost],
  ]);
  showTraffic(view);
  showFeatures(view, question);
  showFlagged(view, catalogue);
  showEngines(view.engines);
  at("engines-empty").hidden = view.engines.length > 0;
  const caution = "A feature above its limit is evidence, not proof.";
  setText(at("about"), `latentwatch ${view.version}. ${caution} ${view.watchlist_notes}`);
  showLinks(view.links);
  document.title = titleOf([view.wrong, view.seen]);
}

/** Out of the page, where this collector was told to where. @param {Links} links */
function showLinks(links) {
  showWays(at("elsewhere"), [
    ["runbook", links.runbook],
    ["Grafana", grafanaBoard(links, "overview")],
  ]);
}

/** @param {Verdict[]} verdicts */
function titleOf(verdicts) {
  const worst = verdicts.find((v) => v.level === "problem") ?? verdicts.find((v) => v.level === "attention");
  return worst ? `${TITLE_MARKS[worst.level]}${worst.headline} – latentwatch` : "latentwatch";
}

/** @param {HTMLElement} card */
function verdictCard(card) {
  const icon = make("span", { className: "icon" });
  const headline = make("h2");
  const detail = make("p", { className: "detail" });
  card.append(make("div", { className: "answer" }, icon, make("div", {}, headline, detail)));
  /** @param {Verdict} verdict */
  return (verdict) => {
    if (card.dataset.level !== verdict.level) {
      card.dataset.level = verdict.level;
      const [shape, sign] = ICONS[verdict.level];
      const parts = [draw("path", { class: "shape", d: shape }), draw("path", { class: "sign", d: sign })];
      icon.replaceChildren(draw("svg", { viewBox: "0 0 26 26", role: "img", "aria-label": verdict.level }, ...parts));
    }
    setText(headline, verdict.headline);
    setText(detail, verdict.detail);
  };
}

/** @param {Coverage} coverage */
function showCoverage({ tokens }) {
  const total = STATES.reduce((sum, state) => sum + tokens[state], 0);
  const present = STATES.filter((state) => tokens[state] > 0);
  at("bar").replaceChildren(
    ...present.map((state) => {
      const part = make("span", { className: state });
      part.style.flexGrow = String(tokens[state]);
      return part;
    }),
  );
  const words = present.map((state) => `${share(tokens[state] / total)} ${state}`).join(", ");
  at("bar").setAttribute("aria-label", words || "no tokens yet");
  showLegend(STATES.map((state) => [state, tokens[state], total]));
}

/** @returns {Row<[state: string, tokens: number, total: number]>} */
function legendRow() {
  const swatch = make("i");
  const name = make("span");
  const value = make("dd");
  const node = make("div", {}, make("dt", {}, swatch, name), value);
  return {
    node,
    update([state, tokens, total]) {
      swatch.className = state;
      setText(name, state);
      setText(value, count(tokens));
      node.title = total ? share(tokens / total) : "";
    },
  };
}

/** @returns {Row<[name: string, value: number]>} */
function figureRow() {
  const name = make("dt");
  const value = make("dd");
  return {
    node: make("div", {}, name, value),
    update([words, n]) {
      setText(name, words);
      setText(value, count(n));
    },
  };
}

/**
 * @param {Overview} view
 * @param {Question} question
 */
function showFeatures(view, { first, search }) {
  const { features, features_found: found, features_total: total } = view;
  showRows(features);
  const which = found > PAGE ? `${first + 1} to ${first + features.length} of ` : "";
  const among = found < total ? `${count(found)} found among ${count(total)}` : count(total);
  setText(at("features-note"), `${which}${among}, the most abnormal first`);
  at("features-empty").hidden = features.length > 0;
  const where = "in its id, label, hook point or severity";
  setText(at("features-empty"), `None of ${count(total)} features has “${search.trim()}” ${where}.`);
  at("pages").hidden = found <= PAGE;
  at("earlier", HTMLButtonElement).disabled = first === 0;
  at("later", HTMLButtonElement).disabled = first + features.length >= found;
  const minutes = (view.tokens_seen.length * view.window_seconds) / 60;
  setText(at("span"), `last ${minutes % 1 ? minutes.toFixed(1) : minutes} min`);
}

/** @param {string} name of its column, which a card says again */
function numberCell(name) {
  const node = make("td", { className: "number" });
  node.dataset.name = name;
  return node;
}

/** @returns {Row<FeatureSeries>} */
function featureRow() {
  const label = make("b");
  const link = featureLink("", label);
  const about = make("span");
  const plot = sparkline();
  const drifts = make("span", { className: "drifts" }, "drifts");
  const [peak, limit, fires, exceeded] = ["Peak", "Limit", "Fires on", "Exceeded"].map((name) => numberCell(name));
  peak.classList.add("peak");
  const name = make("td", { className: "name" }, link, make("small", {}, drifts, about));
  const node = make("tr", {}, name, make("td", { className: "plot" }, plot.node), peak, limit, fires, exceeded);
  return {
    node,
    update(feature) {
      node.classList.toggle("hot", feature.recent_exceedances > 0);
      link.href = hashOf({ kind: "feature", id: feature.feature });
      setText(label, feature.label || feature.feature);
      label.title = `${feature.statistic}, in ${feature.units || "its own units"}`;
      setText(about, `${feature.feature} · ${feature.hook_point} · ${feature.severity}`);
      drifts.hidden = !feature.drifts;
      plot.update(feature);
      setText(peak, figure(feature.peak));
      setText(limit, figure(feature.limit));
      const sparse = feature.kind === "sae" || feature.fired_ratio !== null;
      setText(fires, sparse ? share(feature.fired_ratio) : "every token");
      setText(exceeded, feature.limit === null ? "no limit" : count(feature.exceedances));
      exceeded.classList.toggle("muted", !feature.exceedances);
    },
  };
}

/** @param {Engine} engine */
function modelLine(engine) {
  if (engine.model_match === "same") return "";
  if (engine.model_match === "differs") return `not the watchlist's model: ${engine.model_text}`;
  return engine.model_text || "not compared with the watchlist's model";
}

/** @returns {Row<Engine>} */
function engineRow() {
  const replica = make("td", { className: "name" });
  const model = make("span");
  const identity = make("small", { className: "sub" });
  const state = make("span");
  const reason = make("small", { className: "sub" });
  const [open, heard] = ["Open requests", "Last heard"].map((name) => numberCell(name));
  const versions = make("td", { className: "muted" });
  return {
    node: make(
      "tr",
      {},
      ...[replica, make("td", {}, model, identity), make("td", {}, state, reason), open, heard, versions],
    ),
    update(engine) {
      setText(replica, engine.replica);
      setText(model, `${engine.model_name} (engine ${engine.engine})`);
      setText(identity, modelLine(engine));
      state.className = `state ${engine.state.replace(" ", "-")}`;
      setText(state, engine.state);
      setText(reason, engine.text || engine.reason);
      setText(open, count(engine.open_requests));
      setText(heard, ago(engine.last_seen_seconds_ago));
      setText(versions, `vLLM ${engine.engine_version}, plugin ${engine.plugin_version}`);
    },
  };
}
