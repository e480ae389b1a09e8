"""A watchlist file as text for a terminal."""

from __future__ import annotations

from latentwatch.watchlist.file import Feature, Limit, Watchlist


def as_text(watchlist: Watchlist) -> str:
    """Every feature on a line, hook point by hook point, under the watchlist's own facts."""
    model = watchlist.model
    lines = [
        f"{watchlist.name}  (sha256 {watchlist.sha256})",
        f"model {model.name}: {model.architecture}, d_model {model.d_model}, {model.layers} layers, "
        f"vocabulary {model.vocab_size}, right for {', '.join(model.dtypes)}",
        f"identity: {identity_text(watchlist)}",
    ]
    if watchlist.notes:
        lines += ["", watchlist.notes.strip()]
    for rows in watchlist.hooks:
        lines += ["", f"{rows.hook_point}: {len(rows.features)} features"]
        lines += _columns([_row(feature) for feature in rows.features])
    return "\n".join(lines) + "\n"


def identity_text(watchlist: Watchlist) -> str:
    """What the file states of its model beyond the sizes."""
    return watchlist.identity.summary() if watchlist.identity else "not stated; an engine cannot tell another model"


def statistic_text(limit: Limit | None) -> str:
    """What a limit is on: `largest value`, `largest mean of 8 tokens in the output`."""
    if limit is None:
        return "largest value"
    name = "largest value" if limit.statistic == "max" else f"largest mean of {limit.window_tokens} tokens"
    return name if limit.phase == "any" else f"{name} in the {limit.phase}"


def limit_text(limit: Limit | None) -> str:
    """`max > 4.2 in the output`, or a dash."""
    if limit is None:
        return "-"
    statistic = "max" if limit.statistic == "max" else f"mean of {limit.window_tokens}"
    phase = "" if limit.phase == "any" else f" in the {limit.phase}"
    return f"{statistic} > {limit.value:g}{phase}"


def _row(feature: Feature) -> tuple[str, ...]:
    auroc = feature.evidence.get("auroc")
    return (
        feature.id,
        feature.severity.value,
        feature.kind,
        f"gate {feature.gate}",
        limit_text(feature.limit),
        "" if auroc is None else f"AUROC {auroc:.3f}",
        feature.label,
    )


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
