"""Causes by which what was counted or found is not stored, or cannot be read again. Pure functions of the facts."""

from __future__ import annotations

from typing import Final

from latentwatch.collector.health.cause import Cause, HealthFacts, duration, listed

CHECKPOINT_SECONDS: Final = 600.0
_DISK_SHARE: Final = 0.05
_DISK_BYTES: Final = 1 << 30
_NO_SPACE: Final = "No space left on device"


def _state(facts: HealthFacts) -> str:
    state, now = facts.process.state, facts.snapshot.now
    if not state.durable and state.write_failures:
        return f"{state.write_failures} writes failed, the last with: {state.last_error or 'no words'}"
    age = now - state.checkpoint_seconds
    if state.checkpoint_seconds and age > CHECKPOINT_SECONDS:
        return f"its newest checkpoint is {duration(age)} old"
    return ""


def _in_memory(facts: HealthFacts) -> str:
    return "it was started without --state" if facts.process.state.in_memory else ""


def _evidence(facts: HealthFacts) -> str:
    lost, writer = facts.rose("evidence_dropped"), facts.process.evidence.writer
    why = f"; the last error: {writer.last_error}" if "write_failed" in lost and writer.last_error else ""
    return listed(f"{count:.0f} records lately, {reason}" for reason, count in lost.items()) + why if lost else ""


def _disk(facts: HealthFacts) -> str:
    process = facts.process
    said = {"state": process.state.last_error, "evidence": process.evidence.writer.last_error}
    failed = {"state": not process.state.durable, "evidence": bool(facts.rose("evidence_dropped"))}
    rows = []
    for disk in process.disks:
        refused = failed[disk.folder] and _NO_SPACE in said[disk.folder]
        if refused or disk.free_bytes < min(_DISK_BYTES, _DISK_SHARE * disk.size_bytes):
            rows.append(f"under --{disk.folder} {disk.free_bytes >> 20} MiB of {disk.size_bytes >> 20} MiB are free")
    return listed(rows)


def _aside(facts: HealthFacts) -> str:
    evidence, state = len(facts.process.evidence.damaged), facts.process.state.files_aside
    names = f" ({listed(facts.process.evidence.damaged)})" if evidence else ""
    return f"{evidence} of evidence{names} and {state} of the state" if evidence or state else ""


def _otlp(facts: HealthFacts) -> str:
    events = facts.rose("events_dropped").get("", 0)
    pushes = facts.rose("metrics_failures").get("", 0)
    return f"{events:.0f} events and {pushes:.0f} pushes of metrics lately" if events or pushes else ""


CAUSES: Final = (
    Cause(
        "state_not_durable",
        "storage",
        "problem",
        "The state cannot be saved: a collector that dies now loses what it counted",
        _state,
        "Free space on the disk of --state, or restore it.",
        alert="LatentwatchStateNotSaved",
    ),
    Cause(
        "state_in_memory",
        "storage",
        "notice",
        "The state is in memory only",
        _in_memory,
        "Give the collector --state FOLDER, so that a restart loses nothing.",
        alert="",
        why_no_alert="a choice of who starts it, not an event",
    ),
    Cause(
        "evidence_lost",
        "storage",
        "problem",
        "Evidence is lost",
        _evidence,
        "Free space on the disk of --evidence, or restore it; metrics and alerts are not affected.",
        alert="LatentwatchEvidenceLost",
    ),
    Cause(
        "disk_full",
        "storage",
        "problem",
        "A disk of the collector is full, or nearly",
        _disk,
        "Free space there, or give --evidence-gib a smaller bound.",
    ),
    Cause(
        "files_aside",
        "storage",
        "attention",
        "Files that cannot be read were set aside",
        _aside,
        "The collector's log names each. For evidence run 'latentwatch evidence repair'; see the runbook.",
        alert="LatentwatchFilesSetAside",
    ),
    Cause(
        "otlp_failing",
        "storage",
        "attention",
        "The OTLP receiver does not take what is sent",
        _otlp,
        "Is the receiver of --otlp up, and does it accept this collector?",
    ),
)
