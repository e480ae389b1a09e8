// The live page. Text from outside (request ids, labels, reasons) only ever goes through textContent.
"use strict";

const REFRESH_MS = 2000;
const PAGE = 48;
const STATES = ["scored", "inherited", "unseen", "dropped"];
const ICONS = {
  ok: ["M13 1a12 12 0 1 0 0 24 12 12 0 0 0 0-24Z", "m8 13.5 3.5 3.5 7-7.5"],
  waiting: ["M13 1a12 12 0 1 0 0 24 12 12 0 0 0 0-24Z", "M8 13h.01M13 13h.01M18 13h.01"],
  attention: ["M13 1.5 25.5 24H.5Z", "M13 10v6M13 20h.01"],
  problem: ["M8 1h10l7 7v10l-7 7H8l-7-7V8Z", "m9 9 8 8M17 9l-8 8"],
};

const at = (id) => document.getElementById(id);
// Rank of the first feature on the page. The collector ranks and searches, so that the browser holds one page of them.
let first = 0;
let asked = 0;
let shown = null;

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// Setting what is set already has the browser lay it out again.
function place(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
  }
}

function draw(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  place(node, attributes);
  node.append(...children);
  return node;
}

function setText(node, text) {
  if (node.textContent === text) return;
  if (node.firstChild) node.firstChild.data = text;
  else node.textContent = text;
}

// Rows are kept and updated in place, so that neither the keyboard's focus nor a selection is lost at a refresh. A row
// that is no longer wanted serves the next item that comes: thousands that wait to be collected are much memory.
const rowsOf = new WeakMap();
function reconcile(parent, items, keyOf, create, update) {
  if (!rowsOf.has(parent)) rowsOf.set(parent, { rows: new Map(), spare: [] });
  const { rows, spare } = rowsOf.get(parent);
  const wanted = new Map(items.map((item) => [keyOf(item), item]));
  for (const [key, row] of rows) {
    if (!wanted.has(key)) {
      row.remove();
      rows.delete(key);
      spare.push(row);
    }
  }
  let next = parent.firstChild;
  for (const [key, item] of wanted) {
    let row = rows.get(key);
    if (!row) rows.set(key, (row = spare.pop() ?? create(item)));
    update(row, item);
    if (row === next) next = next.nextSibling;
    else parent.insertBefore(row, next);
  }
}

// -- words

const whole = new Intl.NumberFormat("en");
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

function count(n) {
  return n < 100000 ? whole.format(n) : short.format(n);
}

function figure(x) {
  if (x === null || x === undefined) return "–";
  const size = Math.abs(x);
  if (size !== 0 && size < 0.001) return x.toExponential(1);
  return x.toFixed(size < 10 ? 2 : size < 100 ? 1 : 0);
}

function share(ratio) {
  if (ratio === null) return "–";
  const percent = ratio * 100;
  if (ratio === 0) return "0 %";
  return (percent < 0.01 ? "< 0.01" : percent.toFixed(percent < 1 ? 2 : 1)) + " %";
}

function ago(seconds) {
  if (seconds < 1.5) return "just now";
  if (seconds < 90) return `${Math.round(seconds)} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  return `${Math.round(seconds / 3600)} h ago`;
}

function clockTime(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString("en-GB");
}

function shortId(view) {
  return view.request_id || "id not known yet";
}

// -- plots

// Only plots that can be seen are drawn anew at a refresh: the paths of the others would be garbage, megabytes a minute.
const inView = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    target.away = !isIntersecting;
    if (isIntersecting) sparkline(target, ...target.plotted);
  }
});

// A line per stretch of windows with values, a dashed limit, and a dot on every window above it.
function sparkline(svg, series, limit) {
  svg.plotted = [series, limit];
  if (svg.away) return;
  const values = series.filter((v) => v !== null);
  const top = Math.max(...values, limit ?? -Infinity);
  const bottom = Math.min(0, ...values, limit ?? Infinity);
  const key = JSON.stringify([series, limit]);
  if (svg.drawn === key) return;
  svg.drawn = key;
  const W = series.length - 1 || 1;
  const span = top - bottom || 1;
  const y = (v) => (32 - ((v - bottom) / span) * 28).toFixed(2);
  const parts = { line: "", area: "", over: "" };
  let from = null;
  const end = (i) => {
    if (from !== null) parts.area += `L${i} ${y(bottom)}H${from}Z`;
    from = null;
  };
  series.forEach((v, i) => {
    if (v === null) return end(i - 1);
    parts.line += `${from === null ? "M" : "L"}${i} ${y(v)}`;
    parts.area += `${from === null ? `M${i} ${y(bottom)}L` : "L"}${i} ${y(v)}`;
    // A lone window has no neighbour to draw a line to.
    if (from === null && series[i + 1] == null) parts.line += "h1";
    from ??= i;
    if (limit !== null && v > limit) parts.over += `M${i} ${y(v)}h0`;
  });
  end(series.length - 1);
  if (!svg.firstChild) svg.append(...["base", "area", "line", "limit", "over"].map((name) => draw("path", { class: name })));
  const [base, area, line, bound, over] = svg.children;
  place(svg, { viewBox: `0 0 ${W} 34` });
  place(base, { d: `M0 ${y(Math.max(0, bottom))}H${W}` });
  place(area, { d: parts.area });
  place(line, { d: parts.line });
  place(bound, { d: limit === null ? "" : `M0 ${y(limit)}H${W}` });
  place(over, { d: parts.over });
}

function trafficPlot(view) {
  const seen = view.tokens_seen.slice(0, -1);
  const missed = view.tokens_missed.slice(0, -1);
  const top = Math.max(1, ...seen.map((v, i) => v + missed[i]));
  const y = (v) => (28 - (v / top) * 26).toFixed(2);
  const path = (values) => values.map((v, i) => `${i ? "L" : "M"}${i} ${y(v)}`).join("");
  const W = seen.length - 1;
  const svg = at("traffic-plot");
  if (!svg.firstChild) svg.append(...["base", "area", "line", "missed"].map((name) => draw("path", { class: name })));
  const [base, area, line, lost] = svg.children;
  place(svg, { viewBox: `0 0 ${W} 30` });
  place(base, { d: `M0 28H${W}` });
  place(area, { d: `${path(seen)}L${W} 28H0Z` });
  place(line, { d: path(seen) });
  place(lost, { d: missed.map((v, i) => (v ? `M${i} 28V${y(v)}` : "")).join("") });
}

// -- parts of the page

function verdict(card, answer) {
  if (card.dataset.level !== answer.level) {
    card.dataset.level = answer.level;
    const [shape, sign] = ICONS[answer.level];
    const svg = draw("svg", { viewBox: "0 0 26 26", role: "img", "aria-label": answer.level });
    svg.append(draw("path", { class: "shape", d: shape }), draw("path", { class: "sign", d: sign }));
    card.querySelector(".icon").replaceChildren(svg);
  }
  setText(card.querySelector("h2"), answer.headline);
  setText(card.querySelector(".detail"), answer.detail);
}

function coverage({ tokens }) {
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
  reconcile(
    at("legend"),
    STATES,
    (state) => state,
    (state) =>
      make("div", {}, make("dt", {}, make("i", { className: state }), state), make("dd", {})),
    (row, state) => {
      setText(row.querySelector("dd"), count(tokens[state]));
      row.title = total ? share(tokens[state] / total) : "";
    },
  );
}

function figures(view) {
  const { finished, aborted, lost } = view.requests;
  const rows = [
    ["tokens a second", count(Math.round(view.coverage.tokens_per_second))],
    ["open requests", count(view.open_requests)],
    ["ended requests", count(finished + aborted + lost)],
  ];
  reconcile(
    at("figures"),
    rows,
    ([name]) => name,
    ([name]) => make("div", {}, make("dt", { textContent: name }), make("dd", {})),
    (row, [, value]) => setText(row.querySelector("dd"), value),
  );
}

function featureRow() {
  const row = make("tr");
  const name = make("td", { className: "name" }, featureLink("", ""), make("small"));
  const svg = draw("svg", { preserveAspectRatio: "none", role: "img" });
  row.append(name, make("td", { className: "plot" }, svg));
  inView.observe(svg);
  for (const part of ["peak", "bound", "fires", "exceeded"]) row.append(make("td", { className: `number ${part}` }));
  return row;
}

function updateFeature(row, feature) {
  row.classList.toggle("hot", feature.recent_exceedances > 0);
  const label = row.querySelector("b");
  label.parentNode.href = `#feature=${encodeURIComponent(feature.feature)}`;
  setText(label, feature.label || feature.feature);
  label.title = `${feature.label} (${feature.statistic}, in ${feature.units || "its own units"})`;
  setText(row.querySelector("small"), `${feature.feature} · ${feature.hook_point} · ${feature.severity}`);
  const svg = row.querySelector("svg");
  sparkline(svg, feature.series, feature.limit);
  svg.setAttribute("aria-label", `peak ${figure(feature.peak)}, limit ${figure(feature.limit)}`);
  setText(row.querySelector(".peak"), figure(feature.peak));
  setText(row.querySelector(".bound"), figure(feature.limit));
  setText(row.querySelector(".fires"), feature.kind === "sae" || feature.fired_ratio !== null ? share(feature.fired_ratio) : "every token");
  const exceeded = row.querySelector(".exceeded");
  setText(exceeded, feature.limit === null ? "no limit" : count(feature.exceedances));
  exceeded.classList.toggle("muted", !feature.exceedances);
}

function features(view) {
  const { features: rows, features_found: found, features_total: total } = view;
  reconcile(at("features"), rows, (f) => f.feature, featureRow, updateFeature);
  const which = found > PAGE ? `${first + 1} to ${first + rows.length} of ` : "";
  const of = found < total ? `${count(found)} found among ${count(total)}` : count(total);
  setText(at("features-note"), `${which}${of}, the most abnormal first`);
  at("features-empty").hidden = rows.length > 0;
  setText(at("features-empty"), `None of ${count(total)} features has “${at("filter").value.trim()}” in its id, label, hook point or severity.`);
  at("pages").hidden = found <= PAGE;
  at("earlier").disabled = first === 0;
  at("later").disabled = first + rows.length >= found;
  const minutes = (view.tokens_seen.length * view.window_seconds) / 60;
  setText(at("span"), `last ${minutes % 1 ? minutes.toFixed(1) : minutes} min`);
}

function exceedanceRow() {
  const button = make("button", { type: "button" });
  button.append(
    make("span", { className: "first" }, make("span"), make("b"), make("time")),
    make("span", { className: "values" }),
    make("span", { className: "id" }),
  );
  return make("li", {}, button);
}

function updateExceedance(row, event) {
  const button = row.firstChild;
  button.onclick = () => openRequest(event.request_id);
  button.disabled = !event.request_id;
  const chip = row.querySelector(".first").firstChild;
  chip.className = `chip ${event.severity}`;
  setText(chip, event.severity);
  setText(row.querySelector("b"), event.label || event.feature);
  setText(row.querySelector("time"), ago(shown.now - event.seconds));
  row.querySelector("time").dateTime = new Date(event.seconds * 1000).toISOString();
  const words = `${figure(event.peak)} over limit ${figure(event.limit)}, from token ${event.position} (${event.phase})`;
  const values = row.querySelector(".values");
  if (values.words !== words) {
    values.words = words;
    const [peak, ...rest] = words.split(" ");
    values.replaceChildren(make("strong", { textContent: peak }), ` ${rest.join(" ")}`);
  }
  setText(row.querySelector(".id"), shortId(event));
}

function engineRow() {
  const row = make("tr");
  row.append(make("td"), make("td"), make("td", {}, make("span"), make("small", { className: "sub" })));
  row.append(make("td", { className: "number" }), make("td", { className: "number" }), make("td", { className: "muted" }));
  return row;
}

function updateEngine(row, engine) {
  const [replica, model, state, open, heard, versions] = row.children;
  setText(replica, engine.replica);
  setText(model, `${engine.model_name} (engine ${engine.engine})`);
  state.firstChild.className = `state ${engine.state.replace(" ", "-")}`;
  setText(state.firstChild, engine.state);
  setText(state.lastChild, engine.text || engine.reason);
  setText(open, count(engine.open_requests));
  setText(heard, ago(engine.last_seen_seconds_ago));
  setText(versions, `vLLM ${engine.engine_version}, plugin ${engine.plugin_version}`);
}

function show(view) {
  shown = view;
  setText(at("watchlist"), view.watchlist);
  setText(at("sha"), view.watchlist_sha256.slice(0, 12));
  verdict(at("wrong"), view.wrong);
  verdict(at("seen"), view.seen);
  coverage(view.coverage);
  figures(view);
  trafficPlot(view);
  features(view);
  const keyOf = (event) => `${event.seconds} ${event.request_id} ${event.feature} ${event.position}`;
  reconcile(at("exceedances"), view.exceedances, keyOf, exceedanceRow, updateExceedance);
  at("exceedances-empty").hidden = view.exceedances.length > 0;
  reconcile(at("engines"), view.engines, (e) => e.replica, engineRow, updateEngine);
  at("engines-empty").hidden = view.engines.length > 0;
  setText(at("about"), `latentwatch ${view.version}. A feature above its limit is evidence, not proof. ${view.watchlist_notes}`);
  const mark = { problem: "✕ ", attention: "! ", ok: "", waiting: "" };
  const worst = [view.wrong, view.seen].find((v) => v.level === "problem") ?? [view.wrong, view.seen].find((v) => v.level === "attention");
  document.title = worst ? `${mark[worst.level]}${worst.headline} – latentwatch` : "latentwatch";
}

// -- one request

function fact(name, value) {
  return make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value }));
}

function strip(request) {
  const prompt = request.prompt_tokens ?? 0;
  const total = Math.max(request.total_tokens ?? 0, prompt, ...request.features.map((f) => f.position + 1), 1);
  const svg = draw("svg", { viewBox: `0 0 ${total} 34`, preserveAspectRatio: "none", role: "img" });
  svg.setAttribute("aria-label", "Positions at which features exceeded their limits");
  svg.append(
    draw("rect", { class: "prompt", x: 0, y: 8, width: Math.min(prompt, total), height: 18 }),
    draw("rect", { class: "output", x: Math.min(prompt, total), y: 8, width: Math.max(0, total - prompt), height: 18 }),
  );
  for (const feature of request.features.filter((f) => f.exceeded)) {
    const x = (feature.statistic_position ?? feature.position) + 0.5;
    svg.append(draw("line", { class: "at", x1: x, x2: x, y1: 2, y2: 32 }));
  }
  const note = make("p", {}, make("span", { textContent: `prompt, ${count(prompt)} tokens` }), make("span", { textContent: "marks: where a limit was exceeded most" }));
  return make("div", { className: "strip" }, svg, note);
}

function requestFeatures(request) {
  const body = make("tbody");
  for (const f of request.features) {
    const fired = f.fired_tokens ? count(f.fired_tokens) : "–";
    const row = make("tr", { className: f.exceeded ? "hot" : "" });
    row.append(
      make("td", { className: "name" }, make("b", { textContent: f.label || f.feature }), make("small", { textContent: `${f.feature} · ${f.severity}` })),
      make("td", { className: "number peak", textContent: figure(f.statistic ?? f.max) }),
      make("td", { className: "number", textContent: figure(f.limit) }),
      make("td", { className: "number", textContent: String(f.statistic_position ?? f.position) }),
      make("td", { className: "number", textContent: fired }),
    );
    body.append(row);
  }
  const heads = [["Feature"], ["Largest", "number"], ["Limit", "number"], ["At token", "number"], ["Fired on", "number"]];
  const head = make("tr", {}, ...heads.map(([textContent, className = ""]) => make("th", { textContent, className, scope: "col" })));
  return make("div", { className: "scroll" }, make("table", {}, make("thead", {}, head), body));
}

function requestView(request) {
  const t = request.tokens;
  const missing = t.unseen + t.dropped;
  const facts = make("dl", { className: "facts" });
  facts.append(
    fact("State", request.outcome),
    fact("Began", clockTime(request.opened_seconds)),
    fact("Tokens", request.total_tokens === null ? `${count(t.scored + t.inherited + missing)} so far` : count(request.total_tokens)),
    fact("Seen", missing ? `${count(t.scored + t.inherited)}, ${count(missing)} missing` : "all of them"),
    fact("Limits exceeded", count(request.exceeded_features)),
    fact("Engine", `${request.replica}, ${request.model_name}`),
    fact("Id in the response", request.response_id || "–"),
  );
  if (request.adapter) facts.append(fact("Adapter", request.adapter));
  if (request.trace_id) facts.append(fact("Trace", request.trace_id));
  const parts = [facts];
  if (!request.opening_seen) parts.push(make("p", { className: "empty", textContent: "This request began before this collector; its first tokens are not in these figures." }));
  if (request.features.length) parts.push(strip(request), requestFeatures(request));
  else parts.push(make("p", { className: "empty", textContent: "No watched feature fired in this request." }));
  if (request.features_left_out) parts.push(make("p", { className: "empty", textContent: `${request.features_left_out} further features fired less.` }));
  return parts;
}

function openRequest(id) {
  location.hash = `request=${encodeURIComponent(id)}`;
}

async function requestParts(id) {
  const [{ ok, body }, strips] = await Promise.all([fetched(`v1/requests/${encodeURIComponent(id)}`), activationParts(id)]);
  if (ok) {
    const [facts, ...rest] = body.requests.flatMap(requestView);
    // With every position known, the line of marks would only repeat it.
    return [facts, ...strips, ...rest.filter((part) => !strips.length || part.className !== "strip")];
  }
  return [make("p", { className: "empty", textContent: String(body.detail) })];
}

// The dialog shows what stands behind the address's #: a request or a feature.
async function showDetails() {
  const dialog = at("request");
  const match = location.hash.match(/^#(request|feature)=(.+)$/);
  if (!match) return dialog.close();
  const [, kind] = match;
  let id = match[2];
  try {
    id = decodeURIComponent(id);
  } catch {
    // A hash typed by hand need not be well encoded; it is then looked up as it stands.
  }
  setText(at("details-kind"), kind === "request" ? "Request" : "Feature");
  setText(at("request-title"), id);
  at("request-title").className = kind;
  at("request-body").replaceChildren(make("p", { className: "empty", textContent: "Looking it up." }));
  if (!dialog.open) dialog.showModal();
  let parts;
  try {
    parts = await (kind === "request" ? requestParts(id) : featureParts(id));
  } catch {
    parts = [make("p", { className: "empty", textContent: "The collector does not answer." })];
  }
  at("request-body").replaceChildren(...parts);
}

// -- the loop

function overviewPath(features, from, search) {
  return `v1/overview?${new URLSearchParams({ features, first: from, search })}`;
}

// Null for an answer that came after the question changed.
async function ask() {
  const turn = ++asked;
  const response = await fetch(overviewPath(PAGE, first, at("filter").value), { signal: AbortSignal.timeout(8000) });
  if (!response.ok) throw new Error(`status ${response.status}`);
  const view = await response.json();
  return turn === asked ? view : null;
}

async function turnTo(rank) {
  first = Math.max(0, rank);
  try {
    const view = await ask();
    if (view) show(view);
  } catch {
    // The next refresh says that the collector does not answer.
  }
}

async function refresh() {
  let view;
  try {
    view = await ask();
    if (view === null) return;
  } catch (error) {
    view = null;
    const since = shown === null ? "Nothing has been shown yet." : `What is shown is from ${clockTime(shown.now)}.`;
    setText(at("banner"), `The collector does not answer (${error.message}). ${since} Trying again every 2 seconds.`);
  } finally {
    // Counted from the answer, so that one that takes longer than this is still shown. A hidden page asks less often.
    setTimeout(refresh, document.hidden ? 4 * REFRESH_MS : REFRESH_MS);
  }
  document.body.classList.toggle("stale", view === null);
  at("banner").hidden = view !== null;
  setText(at("live-text"), view === null ? "no connection" : "live");
  if (view !== null) show(view);
}

at("filter").addEventListener("input", () => turnTo(0));
at("earlier").addEventListener("click", () => turnTo(first - PAGE));
at("later").addEventListener("click", () => turnTo(first + PAGE));
at("find").addEventListener("submit", (event) => {
  event.preventDefault();
  const id = at("find-id").value.trim();
  if (id) openRequest(id);
});
at("close").addEventListener("click", () => at("request").close());
at("request").addEventListener("close", () => {
  if (/^#(request|feature)=/.test(location.hash)) history.pushState(null, "", location.pathname + location.search);
});
