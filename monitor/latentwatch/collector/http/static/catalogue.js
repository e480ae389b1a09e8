// What the watchlist says of each feature. It does not change while a collector lives, so it is asked for once.

import { get } from "./api.js";

/** @import { FeatureTotals } from "./answers.d.ts" */

/** @type {Map<string, FeatureTotals> | null} */
let known = null;

/** Every feature by its id. @returns {Promise<Map<string, FeatureTotals>>} */
export async function watched() {
  known ??= new Map((await get("/v1/features")).features.map((feature) => [feature.id, feature]));
  return known;
}

/**
 * The statistic that a feature's limit is on, in words; of one that is on the watchlist no more, as far as is known.
 * @param {Map<string, FeatureTotals>} catalogue
 * @param {string} id
 */
export function statisticOf(catalogue, id) {
  return catalogue.get(id)?.statistic ?? "largest value";
}
