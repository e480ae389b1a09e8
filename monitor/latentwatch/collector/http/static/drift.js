// Drift from the baseline: the features whose detectors are nearest to their limits, or furthest above them.

import { get } from "./api.js";
import { watched } from "./catalogue.js";
import { at, make, setText } from "./dom.js";
import { ago, count, figure } from "./format.js";
import { featureLink } from "./links.js";
import { meter } from "./plots.js";

/** @import { Alarm, DriftOfFeature, DriftOfModel, FeatureTotals } from "./answers.d.ts" */

/** One row: a feature of a model, and its detector that is nearest to its limit. */
/** @typedef {{ model: DriftOfModel, feature: DriftOfFeature, kind: string, over: number }} Suspect */

const ROWS_SHOWN = 8;
/** @type {Record<string, string>} */
const KINDS = {
  rate: "how often",
  shape: "how strongly",
  replica: "one engine",
  coactivation: "together with",
  canary: "fixed prompts",
};

let drawn = "";

/** Asks for drift and shows it. */
export async function refreshDrift() {
  const catalogue = await watched();
  showDrift((await get("/v1/drift")).models, catalogue);
}

/**
 * When the change began, by the detector's own estimate: 0 where it never saw the feature without it.
 * @param {Alarm} alarm
 */
export function began({ since_seconds }) {
  return since_seconds ? ago(Date.now() / 1000 - since_seconds) : "since the start";
}

/**
 * @param {DriftOfModel[]} models
 * @param {Map<string, FeatureTotals>} catalogue
 */
function showDrift(models, catalogue) {
  const suspects = models
    .filter((model) => model.armed)
    .flatMap((model) => model.features.slice(0, ROWS_SHOWN).map((feature) => suspect(model, feature)))
    .sort((one, other) => other.over - one.over)
    .slice(0, ROWS_SHOWN);
  setText(at("drift-note"), note(models));
  at("drift-table").hidden = suspects.length === 0;
  // Focus stays: rows are replaced only where what they say has changed.
  const key = JSON.stringify(suspects.map(({ model, feature }) => [model.model_name, feature, model.alarms]));
  if (drawn === key) return;
  drawn = key;
  at("drift").replaceChildren(...suspects.map((found) => driftRow(found, catalogue)));
}

/**
 * @param {DriftOfModel} model
 * @param {DriftOfFeature} feature
 * @returns {Suspect}
 */
function suspect(model, feature) {
  return Object.entries(feature.log10_evalue)
    .map(([kind, value]) => ({ model, feature, kind, over: value - model.log10_limit[kind] }))
    .reduce((best, next) => (next.over > best.over ? next : best));
}

/**
 * @param {Suspect} suspect
 * @param {Map<string, FeatureTotals>} catalogue
 */
function driftRow({ model, feature, kind }, catalogue) {
  const { feature: id, rate_ratio, log10_evalue } = feature;
  const alarm = model.alarms.find((found) => found.feature === id && found.kind === kind);
  const words = `${KINDS[kind] ?? kind} · ${alarm ? began(alarm) : model.model_name}`;
  const name = featureLink(id, make("b", {}, catalogue.get(id)?.label || id));
  return make(
    "tr",
    { className: alarm ? "hot" : "" },
    make("td", { className: "name" }, name, make("small", { title: alarm?.text ?? "" }, words)),
    make("td", { className: "meter" }, meter(log10_evalue[kind], model.log10_limit[kind])),
    make("td", { className: "number peak" }, rate_ratio === null ? "–" : `× ${figure(rate_ratio)}`),
  );
}

/** @param {DriftOfModel[]} models */
function note(models) {
  if (!models.length) return "No model streams here yet.";
  if (!models.some((model) => model.armed)) {
    const [{ reason }] = models;
    if (reason === "no_baseline") return "Not measured: this collector was started without a baseline.";
    return `Not measured: ${reason.replaceAll("_", " ")}.`;
  }
  const alarms = models.reduce((sum, model) => sum + model.alarms.length, 0);
  const windows = models.reduce((sum, model) => sum + model.windows, 0);
  const state = alarms
    ? `${count(alarms)} ${alarms === 1 ? "detector" : "detectors"} above the limit.`
    : `None above its limit in ${count(windows)} windows.`;
  return state + models.map(commonWords).join("") + models.map(canaryWords).join("");
}

/**
 * What all features have in common, once it pages: it says what each of them is compared with.
 * @param {DriftOfModel} model
 */
function commonWords({ alarms }) {
  const common = alarms.find((alarm) => alarm.kind === "common");
  return common ? ` ${common.text.split(". ")[0]}; it began ${began(common)}.` : "";
}

/** @param {DriftOfModel} model */
function canaryWords({ alarms }) {
  const moved = alarms.map((alarm) => alarm.canary_moved).find((said) => said !== null);
  if (moved === undefined) return "";
  if (moved) return " The canary moved: the model itself changed.";
  return " The canary did not move: the input changed, not the model.";
}
