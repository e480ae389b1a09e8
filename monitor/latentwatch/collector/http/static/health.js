// What is wrong with the monitor itself: the collector's table of health causes, in its words.

import { at, liveList, make, setText } from "./dom.js";
import { runbookEntry, showWays } from "./links.js";

/** @import { FoundCause, Links } from "./answers.d.ts" */
/** @import { Row } from "./dom.js" */

const showRows = liveList(at("health-causes"), ({ cause }) => cause.name, causeRow);

/**
 * @param {FoundCause[]} causes the worst first
 * @param {Links} links
 */
export function showHealth(causes, links) {
  showRows(causes.map((cause) => ({ cause, links })));
  at("health").hidden = causes.length === 0;
  const wrong = causes.filter((cause) => cause.level === "problem" || cause.level === "attention").length;
  setText(at("health-note"), wrong === 0 ? "Nothing is wrong with it." : "");
}

/** @returns {Row<{ cause: FoundCause, links: Links }>} */
function causeRow() {
  const headline = make("strong");
  const found = make("span");
  const instead = make("span", { className: "note" });
  const entry = make("span", { className: "entry" });
  const node = make("li", { className: "cause" }, headline, " ", found, " ", instead, " ", entry);
  return {
    node,
    update({ cause, links }) {
      node.dataset.level = cause.level;
      setText(headline, `${cause.headline}:`);
      setText(found, `${cause.found}.`);
      setText(instead, cause.instead);
      showWays(entry, [["What to do", cause.alert && runbookEntry(links, cause.alert)]]);
    },
  };
}
