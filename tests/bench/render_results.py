"""Tables of docs/results.md, metrics.md, watchlist.md and settings.md, from what they show: files and code.

python -m tests.bench.render_results            # write
python -m tests.bench.render_results --check    # exit code 1 where one is stale
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentwatch.errors import RefusalReason
from latentwatch.export.metrics import METRICS

from tests.support import reference
from tests.support.engines import ROOT
from tests.support.reference import table

RESULTS_PAGE = ROOT / "docs/results.md"
WATCHLIST_PAGE = ROOT / "docs/watchlist.md"
SETTINGS_PAGE = ROOT / "docs/settings.md"
METRICS_PAGE = ROOT / "docs/metrics.md"
RESULTS = ROOT / "tests/bench/results"


def _result(name: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return read


def _made(result: dict[str, Any]) -> str:
    """Where and when the figures of a result file were taken."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{result['hardware']}, {result['date']}; {versions}."


def step_time() -> str:
    result = _result("step-time")
    rows = [
        [
            row["model"],
            str(row["batch"]),
            f"{row['step_ms_off']:.2f} ms",
            f"{row['throughput_ratio_p50']:.3f}",
            f"{row['throughput_ratio_p20']:.3f} to {row['throughput_ratio_p80']:.3f}",
        ]
        for row in result["rows"]
    ]
    watched = sorted({(row["model"], row["features"], row["pairs"]) for row in result["rows"]})
    run = "; ".join(f"{model}: {features} features, {pairs} pairs a row" for model, features, pairs in watched)
    header = ["model", "concurrent requests", "step, off", "median ratio", "p20 to p80"]
    return f"{table(header, rows)}\n\n{run}, {_made(result)}"


def probes() -> str:
    card: dict[str, Any] = json.loads((ROOT / "monitor/latentwatch/demo/assets/card.json").read_text())
    rows = [
        [
            name.replace("_", " "),
            f"{probe['heldout']['auroc']:.3f}",
            f"{probe['heldout']['tpr_at_fpr_1pct']:.0%}",
            f"{probe['heldout']['n']} ({probe['heldout']['n_positive']})",
        ]
        for name, probe in card["probes"].items()
    ]
    return table(["act", "AUROC", "TPR at 1 % FPR", "dialogues (acts)"], rows)


def detectors() -> str:
    if not (RESULTS / "detectors.json").exists():
        return "Not measured yet: `make bench-detectors` writes the file that this table is made of."
    result = _result("detectors")
    rows = [
        [
            row["concern"].replace("_", " "),
            row["family"].replace("_", " "),
            row["negatives"],
            f"{row['n']}, {row['n_negative']}",
            "{:.0%} ({:.0%} to {:.0%})".format(row["tpr_at_1pct"], *row["tpr_interval"]),
            f"{row['tpr_text']:.0%}",
            f"{row['tpr_length']:.0%}",
            f"{row['auroc']:.3f}",
            f"{row['auroc_text']:.3f}",
        ]
        for row in result["rows"]
    ]
    header = ["concern", "family", "against", "n", "TPR at 1 % FPR", "text", "length", "AUROC", "AUROC of the text"]
    better, others = _better_than_text(result["rows"])
    missing = [name for name, version in result["sets"].items() if version == "not installed"]
    lines = [
        table(header, rows),
        f"By 10 points or more better than the text, on average over families against hard texts: {better or 'none'}. "
        f"Not better by as much: {others or 'none'}.",
        f"{result['cpu_seconds']} CPU seconds; sets that were not installed: {', '.join(missing) or 'none'}. "
        f"{_made(result)}",
    ]
    return "\n\n".join(lines)


def _better_than_text(rows: list[dict[str, Any]]) -> tuple[str, str]:
    """Concerns with a mean difference of 10 points of TPR or more against hard texts, and the others."""
    hard = [row for row in rows if row["negatives"] == "hard"]
    names = dict.fromkeys(row["concern"] for row in hard)
    by = {n: [r["tpr_at_1pct"] - r["tpr_text"] for r in hard if r["concern"] == n] for n in names}
    shown = {n: f"{n.replace('_', ' ')} ({sum(b) / len(b):+.0%})" for n, b in by.items()}
    better = [n for n, b in by.items() if sum(b) / len(b) >= 0.10]
    return ", ".join(shown[n] for n in better), ", ".join(shown[n] for n in names if n not in better)


def evidence() -> str:
    result = _result("evidence")
    header = ["exceedances", "offered", "written", "per CPU second", "look-up p50", "p99", "CPU p99", "deletion"]
    rows = [
        [
            f"{row['exceedances']:,}",
            f"{row['pace_per_second']:,} a second" if row["pace_per_second"] else "as fast as taken",
            f"{row['exceedances_per_second']:,} a second",
            f"{row['exceedances_per_cpu_second']:,}",
            f"{row['look_up_ms_p50']:.2f} ms",
            f"{row['look_up_ms_p99']:.2f} ms",
            f"{row['look_up_cpu_ms_p99']:.2f} ms",
            f"{row['delete_seconds_p50']:.2f} s",
        ]
        for row in result["rows"]
    ]
    loads = [row[name] for row in result["rows"] for name in ("load_average_before", "load_average_after")]
    load = f"load average of the machine {min(loads)} to {max(loads)}"
    return f"{table(header, rows)}\n\n{_made(result | {'hardware': result['hardware'] + ', ' + load})}"


def page() -> str:
    result = _result("page")
    header = ["page", "features", "empty", "at start", "at the end", "largest", "proportional, largest"]
    rows = [
        [
            f"{row['view']}, {row['minutes']:g} minutes",
            f"{row['features']:,}",
            *(f"{row[f'resident_mb_{when}']:.0f} MB" for when in ("without_page", "at_start", "at_end", "largest")),
            f"{row['proportional_mb_largest']:.0f} MB",
        ]
        for row in result["rows"]
    ]
    shown = f"Features shown after {result['load_seconds_p50']:.2f} s (median of {result['loads']} loads)"
    load = f"load average of the machine {result['load_average_before']} to {result['load_average_after']}"
    return f"{table(header, rows)}\n\n{shown}, {result['load_seconds_max']:.2f} s at most; {load}. {_made(result)}"


def night() -> str:
    if not (RESULTS / "night.json").exists():
        return "Not measured yet: `make bench-night` writes the file that this table is made of."
    result = _result("night")
    header = ["what happens", "pages", "tickets", "goal", ""]
    rows = [
        [row["line"], str(row["pages"]), str(row["tickets"]), row["goal"], "as it should be" if row["ok"] else "NOT"]
        for row in result["rows"]
    ]
    return f"{table(header, rows)}\n\nRules {result['times_as_fast']} times as fast. {_made(result)}"


def chaos() -> str:
    result = _result("chaos")
    columns = ("faults", "sent", "merged", "shed", "lost", "doubled", "unbooked", "open")
    rows = [
        [row["fault"], *(f"{row[name]:,}" if name in row else "-" for name in columns), _ratio(row["step_time_ratio"])]
        for row in result["rows"]
    ]
    header = ["fault", "times", "tokens sent", "merged", "shed, counted", "lost", "doubled", "unbooked", "open"]
    header.append("step time")
    return f"{table(header, rows)}\n\n{_made(result)}"


def fuzz() -> str:
    result = _result("fuzz")
    rows = sorted(result["rows"], key=lambda row: row["target"])
    shown = [
        [row["target"], *(f"{row[name]:,}" for name in ("inputs", "executions_per_s", "unexpected", "coverage_lines"))]
        for row in rows
    ]
    total = sum(row["inputs"] for row in rows)
    header = ["format", "inputs", "a second", "unexpected", "lines reached"]
    return f"{table(header, shown)}\n\n{total:,} inputs. {_made(result)}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"x{value:.3f}"


def collector() -> str:
    result = _result("collector")
    rows = [
        [
            str(row["features"]),
            f"{row['tokens_per_second_per_core']:,}",
            f"{row['p50_step_to_metrics_seconds']:.2f} s / {row['p99_step_to_metrics_seconds']:.2f} s",
            f"{row['latency_at_tokens_per_second']:,}",
            f"{1000 * row['exposition_seconds']:.1f} ms",
            f"{row['resident_mib']:.0f} MiB",
        ]
        for row in result["rows"]
    ]
    header = ["features", "tokens/s per core", "step to /metrics, p50 / p99", "at tokens/s", "one page", "resident"]
    memory = result["memory"]
    note = (
        f"{result['rows'][0]['firing_rate']:.0%} firing. {memory['replicas']} replicas and {memory['features']} "
        f"features with every slot and summary in use: {memory['resident_mib']} MiB. {_made(result)}"
    )
    return f"{table(header, rows)}\n\n{note}"


def drift() -> str:
    result = _result("drift")
    nulls = table(["no drift", "pages", "feature-months", "a month (95 %)", "CUSUM", "PSI"], _silent(result["nulls"]))
    header = ["drift", "found", "median minutes", "median tokens", "best other, minutes"]
    milliseconds = result["update_ms_1024_features_64_replicas"]
    update = f"A window of 1,024 features on 64 replicas takes {milliseconds:.0f} ms of one core"
    return f"{nulls}\n\n{table(header, _found(result['drifts']))}\n\n{update}; {_made(result)}"


def _silent(nulls: list[dict[str, Any]]) -> list[list[str]]:
    """Traffic without drift: how often each detector pages all the same."""
    return [
        [
            row["name"],
            str(row["pages"]),
            f"{row['feature_months']:g}",
            f"{row['false_pages_per_month']:.2f} ({row['ci95'][0]:.2f} to {row['ci95'][1]:.2f})",
            f"{_of(nulls, row, 'CUSUM', 'false_pages_per_month'):,.0f}",
            f"{_of(nulls, row, 'PSI', 'false_pages_per_month'):,.0f}",
        ]
        for row in nulls
        if row["detector"] == "latentwatch"
    ]


def _found(drifts: list[dict[str, Any]]) -> list[list[str]]:
    """Traffic that drifts: how often it is found, and when."""
    return [
        [
            row["name"],
            f"{row['found_fraction']:.0%}",
            _shown(row["median_delay_minutes"]),
            _shown(row["median_delay_tokens"]),
            _best_other(drifts, row["name"]),
        ]
        for row in drifts
        if row["detector"] == "latentwatch"
    ]


def drift_real() -> str:
    result = _result("drift-real")
    heldout = result["heldout"]
    held = (
        f"Held-out ordinary traffic: {heldout['pages']} pages in {heldout['requests']:,} requests as they came, "
        f"{heldout['resampled_pages']} in {heldout['resampled_months']:g} months drawn from them "
        f"({heldout['ci95'][0]:.2f} to {heldout['ci95'][1]:.2f} a month, 95 %)."
    )
    parts = (_population(result["population"]), held, _incidents(result["incidents"]))
    return "\n\n".join((*parts, _changed_weights(result["models"]), _made(result)))


def _population(seen: dict[str, Any]) -> str:
    """What the simulation assumes of features, beside what the demo model's are like."""
    simulated = seen["simulated"]

    def spread(values: list[float]) -> str:
        return " to ".join(f"{value:.3g}" for value in (values[0], values[2], values[4]))

    share = "share_of_requests_that_fire"
    assumed = [
        ["share of requests that fire", share, spread(simulated[share])],
        ["dispersion of counts", "dispersion", " or ".join(f"{value:g}" for value in simulated["dispersion"])],
        ["standard deviation of the value's logarithm", "sd_of_log_value", f"{simulated['sd_of_log_value']:g}"],
        ["tokens that fire in such a request", "tokens_per_active_request", "-"],
    ]
    header = [f"of {seen['sparse_features']} SAE features: 5 %, median, 95 %", "measured", "simulated"]
    return table(header, [[label, spread(seen[name]), other] for label, name, other in assumed])


def _incidents(rows: list[dict[str, Any]]) -> str:
    by_share = sorted(rows, key=lambda row: row["share"])
    shown = [
        [topic.replace("_", " "), *(_incident(row) for row in by_share if row["topic"] == topic)]
        for topic in dict.fromkeys(row["topic"] for row in rows)
    ]
    return table(["act, and its share of traffic", "0.1 %", "1 %", "10 %"], shown)


def _changed_weights(models: list[dict[str, Any]]) -> str:
    rows = []
    for model in models:
        report = model["recalibration"]
        low, _, high = report["new_limit_over_old_quantiles_5_50_95"]
        rows.append(
            [
                model["name"],
                f"{model['obeys_trigger']:.0%}, {model['obeys_half_a_trigger']:.0%}",
                _shown(model["canary_requests_to_alarm"]),
                _shown(model["requests_to_alarm"]),
                *(_incident(row) for row in model["with_triggered_prompts"]),
                f"{len(report['to_approve'])}; {low:.2f} to {high:.2f}",
            ]
        )
    header = [
        "weights",
        "obeys the trigger, half of it",
        "canary requests until an alarm",
        "ordinary requests until one",
    ]
    shares = ["trigger in 0.1 %", "in 1 %", "in 10 %"]
    return table([*header, *shares, "recalibration: rates to approve; limits, new / old"], rows)


def _incident(row: dict[str, Any]) -> str:
    if not row["found_fraction"]:
        return "not in 12 h"
    delay = f"{_shown(row['median_delay_windows'])} min, {_shown(row['median_delay_tokens'])} tokens"
    return f"{row['found_fraction']:.0%}" + (f": {delay}" if row["median_delay_windows"] else " in 12 h")


def _of(rows: list[dict[str, Any]], like: dict[str, Any], detector: str, column: str) -> float:
    return float(next(r[column] for r in rows if r["name"] == like["name"] and r["detector"] == detector))


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def _best_other(rows: list[dict[str, Any]], name: str) -> str:
    others = [r for r in rows if r["name"] == name and r["detector"] != "latentwatch" and r["median_delay_minutes"]]
    best = min(others, key=lambda row: row["median_delay_minutes"], default=None)
    return f"{best['detector']} {_shown(best['median_delay_minutes'])}" if best else "-"


def accounting() -> str:
    result = _result("accounting")
    rows = [
        [
            row["mode"],
            row["architecture"],
            str(row["requests"]),
            "exact" if row["i1_exact"] else "NOT exact",
            _largest_error(row),
            "identical" if row["i3_identical"] else "NOT identical",
            row.get("note", ""),
        ]
        for row in sorted(result["rows"], key=lambda row: (not row["architecture"].startswith("Llama"), row["mode"]))
    ]
    header = ["mode", "architecture", "requests", "I1", "I2, largest error", "I3", "note"]
    return f"{table(header, rows)}\n\n{_made(result)}"


def _largest_error(row: dict[str, Any]) -> str:
    if row["refused"]:
        return "refused by name"
    return "not compared" if row["i2_max_error"] is None else f"{row['i2_max_error']:.1e}"


def architectures() -> str:
    result = _result("architectures")
    rows = [
        [
            row["architecture"] + (", compiled" if row["mode"] == "compiled" else ""),
            row["outcome"],
            f"{row['worst_score_error']:.1e}" if "worst_score_error" in row else "",
            str(row.get("positions") or ""),
            row.get("oracle", "").replace("_", " "),
            row["reason"].replace("|", "\\|").replace("<", "&lt;").replace("\n", " "),
        ]
        for row in result["rows"]
    ]
    outcomes = Counter(row["outcome"] for row in result["rows"])
    header = ["architecture", "outcome", "largest error", "positions", "compared with", "why"]
    counted = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    return f"{table(header, rows)}\n\n{counted}. {_made(result)}"


BLOCKS: dict[str, Callable[[], str]] = {
    "accounting": accounting,
    "architectures": architectures,
    "step-time": step_time,
    "chaos": chaos,
    "fuzz": fuzz,
    "collector": collector,
    "evidence": evidence,
    "page": page,
    "night": night,
    "drift": drift,
    "drift-real": drift_real,
    "probes": probes,
    "detectors": detectors,
}
"""The tables of docs/results.md, by the name of the comments that they stand between."""


def metrics() -> str:
    rows = [
        [f"`{one.name}`", one.kind, ", ".join(f"`{label}`" for label in one.labels), one.help.replace("|", "\\|")]
        for one in METRICS
    ]
    return table(["metric", "kind", "labels", "what it says"], rows)


def refusal_reasons() -> str:
    """Those that a collector counts."""
    return table(["reason", "when"], [[f"`{reason}`", reason.when] for reason in RefusalReason if reason.counted])


PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    RESULTS_PAGE: BLOCKS,
    METRICS_PAGE: {"metrics": metrics, "refusal-reasons": refusal_reasons},
    WATCHLIST_PAGE: {"watchlist-keys": reference.watchlist_keys},
    SETTINGS_PAGE: {"environment": reference.environment},
}


def rendered(page: Path) -> str:
    """The page's text with each of its tables rendered anew."""
    text = page.read_text()
    for name, block in PAGES[page].items():
        pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        assert pattern.search(text), f"{page.name} has no block {name}"
        body = block()
        text = pattern.sub(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where a page is stale")
    check = parser.parse_args().check
    stale = [page for page in PAGES if rendered(page) != page.read_text()]
    for page in stale:
        if check:
            print(f"{page.relative_to(ROOT)} is stale: run python -m tests.bench.render_results")
        else:
            page.write_text(rendered(page))
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
