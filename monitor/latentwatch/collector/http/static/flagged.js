// The latest requests that exceeded a limit: one row a request, however many features it was.

import { statisticOf } from "./catalogue.js";
import { at, liveList, make, setText } from "./dom.js";
import { ago, figure, idWords } from "./format.js";
import { hashOf, runbookEntry, showWays } from "./links.js";

/** @import { Anomaly, ExceedanceView, FeatureTotals, Overview } from "./answers.d.ts" */
/** @import { Row } from "./dom.js" */
/** @typedef {{ request: Anomaly, now: number, catalogue: Map<string, FeatureTotals> }} Flagged */

const ALSO_SHOWN = 2;

const showRows = liveList(at("flagged"), ({ request }) => `${request.first_seconds} ${request.request_id}`, flaggedRow);

/**
 * @param {Overview} view
 * @param {Map<string, FeatureTotals>} catalogue
 */
export function showFlagged(view, catalogue) {
  showRows(view.flagged.map((request) => ({ request, now: view.now, catalogue })));
  at("flagged-empty").hidden = view.flagged.length > 0;
  const [latest] = view.flagged;
  const alert = latest?.severity === "critical" ? "LatentwatchCriticalExceedance" : "LatentwatchWarningExceedance";
  const entry = latest && ["critical", "warning"].includes(latest.severity) ? runbookEntry(view.links, alert) : "";
  showWays(at("flagged-more"), [["What to do", entry]]);
}

/** @returns {Row<Flagged>} */
function flaggedRow() {
  const severity = make("span");
  const label = make("b");
  const when = make("time");
  const peak = make("strong");
  const rest = make("span");
  const also = make("span", { className: "also" });
  const id = make("span", { className: "id" });
  const link = make(
    "a",
    {},
    make("span", { className: "first" }, severity, when),
    label,
    make("span", { className: "values" }, peak, rest),
    also,
    id,
  );
  return {
    node: make("li", { className: "flagged-row" }, link),
    update({ request, now, catalogue }) {
      const [worst, ...others] = request.exceedances;
      if (request.request_id) link.href = hashOf({ kind: "request", id: request.request_id });
      else link.removeAttribute("href");
      severity.className = `chip ${request.severity}`;
      setText(severity, request.severity);
      setText(label, worst.label || worst.feature);
      setText(when, ago(now - request.last_seconds));
      when.dateTime = new Date(request.last_seconds * 1000).toISOString();
      setText(peak, figure(worst.peak));
      setText(rest, ` ${statisticOf(catalogue, worst.feature)}, limit ${figure(worst.limit)}, ${whereOf(worst)}`);
      setText(also, alsoWords(others));
      also.hidden = others.length === 0;
      setText(id, idWords(request.request_id));
    },
  };
}

/** Where a request first went above a limit. @param {ExceedanceView} exceedance */
export function whereOf({ position, phase }) {
  return `from token ${position} (${phase})`;
}

/** @param {ExceedanceView[]} others */
function alsoWords(others) {
  const named = others.slice(0, ALSO_SHOWN).map((other) => other.label || other.feature);
  const more = others.length - named.length;
  return `and ${named.join(", ")}${more ? ` and ${more} more` : ""}`;
}
