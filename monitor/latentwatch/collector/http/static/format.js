// Numbers and times as the page writes them.

const whole = new Intl.NumberFormat("en");
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

/** A count: 99,999 in full, then 100K. @param {number} n */
export function count(n) {
  return n < 100000 ? whole.format(n) : short.format(n);
}

/** A value in its own units, to three digits. @param {number | null} x */
export function figure(x) {
  if (x === null) return "–";
  const size = Math.abs(x);
  if (size !== 0 && size < 0.001) return x.toExponential(1);
  return x.toFixed(size < 10 ? 2 : size < 100 ? 1 : 0);
}

/** A ratio 0..1 in percent. @param {number | null} ratio */
export function share(ratio) {
  if (ratio === null) return "–";
  if (ratio === 0) return "0 %";
  const percent = ratio * 100;
  return `${percent < 0.01 ? "< 0.01" : percent.toFixed(percent < 1 ? 2 : 1)} %`;
}

/** @param {number} seconds */
export function ago(seconds) {
  if (seconds < 1.5) return "just now";
  if (seconds < 90) return `${Math.round(seconds)} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  return `${Math.round(seconds / 3600)} h ago`;
}

/** The time of day. @param {number} seconds since the Unix epoch */
export function clockTime(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString("en-GB");
}

/** A request's id as lists show it. @param {string} id empty while it is unknown */
export function idWords(id) {
  return id || "id not known yet";
}
