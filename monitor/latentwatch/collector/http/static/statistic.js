// What a limit compares, token by token: which tokens it counts, and the value that it compares at each of them.

/** @import { FeatureTotals, StoredActivations } from "./answers.d.ts" */

/** A token as one feature shows it. */
/**
 * @typedef {{
 *   position: number, value: number | null, statistic: number | null, counted: boolean, over: boolean
 * }} Token
 */

/**
 * Every token of a request, by position. `value` is the token's own activation, null where none is known; `statistic`
 * is what the limit is compared with there: the same for a maximum, for a mean that of the window that ends there.
 * @param {StoredActivations} found
 * @param {FeatureTotals | undefined} feature as the watchlist describes it now
 * @param {number} total tokens
 * @param {number} prompt tokens
 * @returns {Token[]}
 */
export function tokensOf(found, feature, total, prompt) {
  const { phase = "any", window_tokens: window = 1 } = feature?.limit ?? {};
  const skipped = feature?.skip_first_positions ?? 0;
  /** @type {(number | null)[]} */
  const values = Array(total).fill(null);
  found.positions.forEach((position, i) => {
    values[position] = found.values[i];
  });
  let run = 0;
  let sum = 0;
  /** What a sparse feature shows where it does not fire. */
  const quiet = found.dense ? null : 0;
  return values.map((value, position) => {
    const counted = position >= skipped && (phase === "any" || (phase === "prompt") === position < prompt);
    const score = value ?? quiet;
    // A gap ends the window: a mean is over consecutive tokens.
    run = counted && score !== null ? run + 1 : 0;
    sum = run ? sum + (score ?? 0) - (run > window ? (values[position - window] ?? 0) : 0) : 0;
    const statistic = run >= window ? sum / window : null;
    const over = found.limit !== null && statistic !== null && statistic > found.limit;
    return { position, value, statistic, counted, over };
  });
}

/**
 * From where to where a plot of these tokens goes: the limit, and every counted token but the first, on which models
 * park what they do not need (an attention sink), a hundred times as large as all others.
 * @param {Token[]} tokens
 * @param {number | null} limit
 * @param {boolean} dense
 */
export function scaleOf(tokens, limit, dense) {
  const values = tokens.filter(({ position, counted }) => counted && position > 0).map(({ value }) => value ?? 0);
  const top = values.reduce((most, value) => Math.max(most, value), Math.max(limit ?? 0, 0));
  const bottom = dense ? values.reduce((least, value) => Math.min(least, value), Math.min(limit ?? 0, 0)) : 0;
  return { bottom, top: top > bottom ? top : bottom + 1 };
}
