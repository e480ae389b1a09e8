// Generated from the collector's OpenAPI document by `python -m tests.page.answers`; do not edit.
export interface Answers {
  "/v1/overview": Overview;
  "/v1/features": Features;
  "/v1/exceedances": Exceedances;
  "/v1/drift": Drifts;
  "/v1/requests/{request_id}": Requests;
  "/v1/evidence/requests/{request_id}": EvidenceRequests;
}

/** One detector above its limit, and what is known about it. */
export interface Alarm {
  feature: string;
  kind: string;
  direction: "up" | "down";
  log10_evalue: number;
  log10_limit: number;
  since_seconds: number;
  rate_ratio: number | null;
  rate_ratio_low: number | null;
  rate_ratio_high: number | null;
  replica: string;
  partner: string;
  canary_moved: boolean | null;
  requests: TopRequest[];
  stand_out: string[];
  text: string;
}

/** One request and everything that it exceeded: one event, however many features and tokens it was. */
export interface Anomaly {
  request_id: string;
  response_id: string;
  model_name: string;
  trace_id: string;
  severity: Severity;
  first_seconds: number;
  last_seconds: number;
  exceedances: ExceedanceView[];
}

/** Tokens since the collector started, and how many of them were seen lately. */
export interface Coverage {
  tokens: Record<string, number>;
  missing: Record<string, number>;
  seen_ratio: number | null;
  recent_seen_ratio: number | null;
  tokens_per_second: number;
}

/** One feature against its baseline. */
export interface DriftOfFeature {
  feature: string;
  rate_ratio: number | null;
  log10_evalue: Record<string, number>;
}

/** One model against its baseline. */
export interface DriftOfModel {
  model_name: string;
  armed: boolean;
  reason: string;
  baseline_sha256: string;
  baseline_created_seconds: number;
  windows: number;
  requests: number;
  excluded_windows: number;
  unnamed_requests: number;
  common_ratio: number;
  common_log10_evalue: number | null;
  log10_limit: Record<string, number>;
  alarms: Alarm[];
  features: DriftOfFeature[];
}

/** Drift of every model that streams here. */
export interface Drifts {
  models: DriftOfModel[];
}

/** One engine process. */
export interface Engine {
  replica: string;
  model_name: string;
  engine: string;
  state: "connected" | "not armed" | "disconnected";
  reason: string;
  text: string;
  last_seen_seconds_ago: number;
  open_requests: number;
  engine_version: string;
  plugin_version: string;
  model_match: string;
  model_text: string;
}

/** Requests that are kept, newest first. */
export interface EvidenceRequests {
  requests: StoredRequest[];
}

/** An exceedance of a request that the collector still knows. */
export interface ExceedanceView {
  seconds: number;
  request_id: string;
  response_id: string;
  trace_id: string;
  model_name: string;
  feature: string;
  label: string;
  severity: Severity;
  phase: "prompt" | "output";
  position: number;
  value: number;
  limit: number;
  peak: number;
  tail_probability: number | null;
}

/** Exceedances that this collector holds, newest first. */
export interface Exceedances {
  exceedances: ExceedanceView[];
}

/** One feature over the windows shown, oldest first. */
export interface FeatureSeries {
  feature: string;
  label: string;
  severity: Severity;
  hook_point: string;
  kind: string;
  units: string;
  limit: number | null;
  statistic: string;
  exceedances: number;
  recent_exceedances: number;
  fired_ratio: number | null;
  drifts: boolean;
  peak: number | null;
  series: (number | null)[];
}

/** One feature, as the watchlist describes it and as this collector counted it over all models. */
export interface FeatureTotals {
  id: string;
  label: string;
  severity: string;
  hook_point: string;
  kind: string;
  gate: string;
  units: string;
  limit: Limit | null;
  statistic: string;
  skip_first_positions: number;
  source: Record<string, unknown>;
  evidence: Record<string, unknown>;
  fired_tokens: number;
  requests: number;
  exceedances: number;
  reliability: Reliability | null;
}

/** The watchlist's features with their totals. */
export interface Features {
  watchlist: string;
  sha256: string;
  features: FeatureTotals[];
}

/** A cause that is so now. */
export interface FoundCause {
  name: string;
  part: "engines" | "storage" | "judgement";
  level: "problem" | "attention" | "notice" | "unknown";
  headline: string;
  found: string;
  instead: string;
  alert: string;
}

/** A request exceeds the limit when the statistic of its activations goes above `value`. */
export interface Limit {
  statistic: string;
  value: number;
  window_tokens: number;
  phase: string;
}

/** Where what this collector does not serve is; an empty text where that was not said. */
export interface Links {
  runbook: string;
  grafana: string;
}

/** One refresh of the page. */
export interface Overview {
  now: number;
  version: string;
  watchlist: string;
  watchlist_sha256: string;
  watchlist_notes: string;
  wrong: Verdict;
  seen: Verdict;
  coverage: Coverage;
  open_requests: number;
  requests: Record<string, number>;
  window_seconds: number;
  window_end: number;
  tokens_seen: number[];
  tokens_missed: number[];
  features: FeatureSeries[];
  features_found: number;
  features_total: number;
  flagged: Anomaly[];
  engines: Engine[];
  links: Links;
  causes: FoundCause[];
}

/** How often requests go above a limit: as its baseline promised, and as it was seen here. */
export interface Reliability {
  promised_ratio: number | null;
  exceedances: number;
  requests: number;
  seen_ratio: number | null;
  seen_low: number | null;
  seen_high: number | null;
}

/** One request, open or closed. */
export interface RequestView {
  request_id: string;
  response_id: string;
  trace_id: string;
  replica: string;
  model_name: string;
  engine: string;
  adapter: string;
  outcome: "open" | "finished" | "aborted" | "lost";
  opened_seconds: number;
  closed_seconds: number | null;
  duration_seconds: number | null;
  opening_seen: boolean;
  prompt_tokens: number | null;
  output_tokens: number | null;
  total_tokens: number | null;
  tokens: Record<string, number>;
  exceeded_features: number;
  features: ShownFeature[];
  features_left_out: number;
}

/** Requests that this collector holds. */
export interface Requests {
  requests: RequestView[];
}

/** How much a person should care when a feature exceeds its limit. `none` features are context only. */
export type Severity = "critical" | "warning" | "info" | "none";

/** The first time that a request's statistic for a feature went above its limit. */
export interface ShownExceedance {
  seconds: number;
  request_id: string;
  response_id: string;
  trace_id: string;
  model_name: string;
  feature: string;
  label: string;
  severity: Severity;
  phase: "prompt" | "output";
  position: number;
  value: number;
  limit: number;
}

/** One feature of one request. */
export interface ShownFeature {
  feature: string;
  label: string;
  severity: Severity;
  units: string;
  max: number;
  position: number;
  fired_tokens: number;
  statistic: number | null;
  statistic_position: number | null;
  limit: number | null;
  exceeded: boolean;
}

/** What is kept of one feature over the positions of a request, by position. */
export interface StoredActivations {
  feature: string;
  label: string;
  severity: string;
  units: string;
  limit: number | null;
  dense: boolean;
  positions: number[];
  values: number[];
}

/** One request, as the evidence knows it. Its tokens are empty until it ended. */
export interface StoredRequest {
  request_id: string;
  response_id: string;
  trace_id: string;
  replica: string;
  model_name: string;
  engine: string;
  adapter: string;
  outcome: "open" | "finished" | "aborted" | "lost";
  opened_seconds: number;
  closed_seconds: number | null;
  duration_seconds: number | null;
  opening_seen: boolean;
  prompt_tokens: number | null;
  output_tokens: number | null;
  total_tokens: number | null;
  tokens: Record<string, number>;
  key: number;
  watchlist: string;
  watchlist_sha256: string;
  exceedances: ShownExceedance[];
  features: ShownFeature[];
  features_left_out: number;
  activations: StoredActivations[];
  activations_lost: number;
}

/** A request that showed much of a feature. */
export interface TopRequest {
  request_id: string;
  value: number;
  seconds: number;
}

/** An answer in words. */
export interface Verdict {
  level: "ok" | "waiting" | "attention" | "problem";
  headline: string;
  detail: string;
}
