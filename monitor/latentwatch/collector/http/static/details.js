// What the page shows of one feature, of drift, and of one request token by token. Uses the helpers of page.js.
"use strict";

const KINDS = { rate: "how often", shape: "how strongly", replica: "one engine", coactivation: "together with", canary: "fixed prompts" };
const DRIFT_ROWS = 8;
const DRIFT_MS = 10000;
let drift = null;
let labels = null;

async function fetched(path) {
  const response = await fetch(path, { signal: AbortSignal.timeout(8000) });
  return { ok: response.ok, body: await response.json() };
}

// -- drift

// The kind of detector that is nearest to its limit, or furthest above it.
function strongest(model, row) {
  const kinds = Object.keys(row.log10_evalue);
  const over = (kind) => row.log10_evalue[kind] - model.log10_limit[kind];
  return kinds.reduce((best, kind) => (over(kind) > over(best) ? kind : best));
}

function driftMeter(value, limit) {
  const share = Math.max(0, Math.min(1, value / limit / 1.25));
  const svg = draw("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", role: "img" });
  svg.setAttribute("aria-label", `evidence ${figure(value)}, limit ${figure(limit)}`);
  svg.append(
    draw("rect", { class: "track", x: 0, y: 2, width: 100, height: 6 }),
    draw("rect", { class: value > limit ? "fill alarm" : "fill", x: 0, y: 2, width: 100 * share, height: 6 }),
    draw("line", { class: "limit", x1: 80, x2: 80, y1: 0, y2: 10 }),
  );
  return svg;
}

function driftRow(model, row) {
  const kind = strongest(model, row);
  const alarm = model.alarms.find((a) => a.feature === row.feature && a.kind === kind);
  const words = make("small", { textContent: [KINDS[kind] ?? kind, alarm ? sinceWords(alarm) : model.model_name].join(" · ") });
  if (alarm) words.title = alarm.text;
  return make(
    "tr",
    { className: alarm ? "hot" : "" },
    make("td", { className: "name" }, featureLink(row.feature, labelOf(row.feature)), words),
    make("td", { className: "meter" }, driftMeter(row.log10_evalue[kind], model.log10_limit[kind])),
    make("td", { className: "number peak", textContent: row.rate_ratio === null ? "–" : `× ${figure(row.rate_ratio)}` }),
  );
}

// The detector's own estimate; 0 where it never saw the feature without the change.
function sinceWords(alarm) {
  return alarm.since_seconds ? ago(Date.now() / 1000 - alarm.since_seconds) : "since the start";
}

function canaryWords(model) {
  const moved = model.alarms.map((alarm) => alarm.canary_moved).find((said) => said !== null && said !== undefined);
  if (moved === undefined) return "";
  return moved ? " The canary moved: the model itself changed." : " The canary did not move: the input changed, not the model.";
}

function driftNote(models) {
  if (!models.length) return "No model streams here yet.";
  const dark = models.filter((model) => !model.armed);
  if (dark.length === models.length) {
    return dark[0].reason === "no_baseline" ? "Not measured: this collector was started without a baseline." : `Not measured: ${dark[0].reason.replaceAll("_", " ")}.`;
  }
  const alarms = models.reduce((sum, model) => sum + model.alarms.length, 0);
  const windows = models.reduce((sum, model) => sum + model.windows, 0);
  return (alarms ? `${count(alarms)} ${alarms === 1 ? "detector" : "detectors"} above the limit.` : `None above its limit in ${count(windows)} windows.`) + models.map(canaryWords).join("");
}

function showDrift(models) {
  const rows = models.filter((model) => model.armed).flatMap((model) => model.features.slice(0, DRIFT_ROWS).map((row) => [model, row]));
  const over = ([model, row]) => {
    const kind = strongest(model, row);
    return row.log10_evalue[kind] - model.log10_limit[kind];
  };
  rows.sort((one, other) => over(other) - over(one));
  setText(at("drift-note"), driftNote(models));
  at("drift-table").hidden = rows.length === 0;
  // Focus stays: a row is replaced only where what it says has changed.
  const key = JSON.stringify(rows.map(([model, row]) => [model.model_name, row, model.alarms]));
  if (at("drift").key === key) return;
  at("drift").key = key;
  at("drift").replaceChildren(...rows.slice(0, DRIFT_ROWS).map(([model, row]) => driftRow(model, row)));
}

async function refreshDrift() {
  setTimeout(refreshDrift, document.hidden ? 4 * DRIFT_MS : DRIFT_MS);
  try {
    // The watchlist does not change while a collector lives.
    labels ??= new Map((await fetched("v1/features")).body.features.map((f) => [f.id, f.label]));
    const { ok, body } = await fetched("v1/drift");
    if (ok) showDrift((drift = body.models));
  } catch {
    // The banner of the page says that the collector does not answer.
  }
}

// -- one feature

function labelOf(id) {
  return labels?.get(id) || id;
}

function featureLink(id, text) {
  return make("a", { href: `#feature=${encodeURIComponent(id)}`, className: "feature-link" }, make("b", { textContent: text }));
}

function featureFacts(feature) {
  const limit = feature.limit;
  const statistic = !limit || limit.statistic === "max" ? "largest value" : `mean of ${limit.window_tokens} tokens`;
  const facts = make("dl", { className: "facts" });
  facts.append(
    fact("Id", feature.id),
    fact("Severity", feature.severity),
    fact("Where", `${feature.hook_point}, ${feature.kind}`),
    fact("Limit", limit ? `${figure(limit.value)} on the ${statistic}${limit.phase === "any" ? "" : `, ${limit.phase} only`}` : "none"),
    fact("Requests over it", count(feature.exceedances)),
    fact("Fired in requests", feature.gate === "none" ? "scores every token" : count(feature.requests)),
    fact("Gate", feature.gate),
    fact("Units", feature.units || "its own"),
  );
  for (const [name, value] of Object.entries(feature.evidence)) {
    if (typeof value === "number" || typeof value === "string") facts.append(fact(name.replaceAll("_", " "), typeof value === "number" ? figure(value) : value));
  }
  return facts;
}

function featureDrift(id) {
  const said = (drift ?? []).flatMap((model) => model.alarms).filter((alarm) => alarm.feature === id);
  return said.map((alarm) => make("p", { className: "notice", textContent: `${alarm.text} It began: ${sinceWords(alarm)}.` }));
}

function featureView(feature, overview) {
  const row = overview.features.find((f) => f.feature === feature.id);
  const events = overview.exceedances.filter((event) => event.feature === feature.id).slice(0, 12);
  const parts = [featureFacts(feature), ...featureDrift(feature.id)];
  if (row) {
    const svg = draw("svg", { preserveAspectRatio: "none", role: "img", "aria-label": `peak ${figure(row.peak)}, limit ${figure(row.limit)}` });
    sparkline(svg, row.series, row.limit);
    const bound = row.limit === null ? "" : `, limit ${figure(row.limit)} (dashed)`;
    const ends = make("p", { className: "ends" }, make("span", { textContent: `${count(overview.tokens_seen.length)} windows of ${figure(overview.window_seconds)} s` }), make("span", { textContent: "now" }));
    parts.push(make("h3", { textContent: `Largest value in each window: peak ${figure(row.peak)}${bound}` }), make("div", { className: "big-plot" }, svg, ends));
  }
  const list = make("ol", { className: "plain" });
  for (const event of events) {
    const link = make("a", { href: `#request=${encodeURIComponent(event.request_id)}`, textContent: shortId(event) });
    list.append(make("li", {}, link, ` ${figure(event.peak)}, from token ${event.position} (${event.phase}), ${ago(overview.now - event.seconds)}`));
  }
  parts.push(make("h3", { textContent: "Latest requests over the limit" }), events.length ? list : make("p", { className: "empty", textContent: "None among the latest exceedances." }));
  return parts;
}

async function featureParts(id) {
  const [{ body: all }, { body: overview }] = await Promise.all([fetched("v1/features"), fetched(overviewPath(1, 0, id))]);
  const feature = all.features.find((f) => f.id === id);
  if (!feature) return [make("p", { className: "empty", textContent: `The watchlist has no feature ${id}.` })];
  setText(at("request-title"), feature.label || feature.id);
  return featureView(feature, overview);
}

// -- one request, token by token; only a collector that writes evidence knows every position

function activationStrip(kept, total, prompt) {
  const svg = draw("svg", { viewBox: `0 0 ${total} 12`, preserveAspectRatio: "none", role: "img" });
  const top = Math.max(...kept.values, kept.limit ?? 0, 1e-9);
  const bottom = kept.dense ? Math.min(...kept.values, 0) : 0;
  svg.setAttribute("aria-label", `${kept.label || kept.feature}: ${kept.positions.length} tokens, largest ${figure(Math.max(...kept.values))}`);
  svg.append(draw("rect", { class: "track", x: 0, y: 0, width: total, height: 12 }));
  kept.positions.forEach((position, i) => {
    const over = kept.limit !== null && kept.values[i] > kept.limit;
    const strength = ((kept.values[i] - bottom) / (top - bottom)) ** 0.7;
    // Height as well as shade: the strength can be read without telling colours apart.
    const height = Math.max(1.5, 12 * strength);
    const cell = draw("rect", { class: over ? "cell over" : "cell", x: position, y: 12 - height, width: 1, height, "fill-opacity": (0.25 + 0.75 * strength).toFixed(2) });
    cell.append(draw("title", {}, `token ${position}: ${figure(kept.values[i])}`));
    svg.append(cell);
  });
  svg.append(draw("line", { class: "split", x1: prompt, x2: prompt, y1: 0, y2: 12 }));
  return svg;
}

function activationRows(request) {
  const positions = request.activations.flatMap((kept) => kept.positions);
  const total = Math.max(request.total_tokens ?? 0, ...positions.map((p) => p + 1), 1);
  const prompt = request.prompt_tokens ?? 0;
  const rows = request.activations.slice(0, 12).map((kept) =>
    make("div", { className: "strip-row" }, make("span", { className: "strip-name", textContent: kept.label || kept.feature, title: kept.feature }), activationStrip(kept, total, prompt)),
  );
  const note = make("p", { className: "note", textContent: `One column a token, ${count(total)} in all; the line is where the prompt (${count(prompt)}) ends. Higher is stronger; orange: this token alone is over the limit.` });
  return make("div", { className: "strips" }, make("h3", { textContent: "Token by token" }), ...rows, note);
}

async function activationParts(id) {
  try {
    const { ok, body } = await fetched(`v1/evidence/requests/${encodeURIComponent(id)}`);
    return ok ? body.requests.filter((request) => request.activations.length).map(activationRows) : [];
  } catch {
    return [];
  }
}

refreshDrift();
window.addEventListener("hashchange", showDetails);
refresh().then(showDetails);
