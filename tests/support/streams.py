"""Synthetic watchlists and engine streams: requests token by token, and how a scheduler may cut them into steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from latentwatch.names import HookPoint, Outcome, Phase, Reason, Severity, TokenState
from latentwatch.step.batch import FIRE_DTYPE, SEGMENT_DTYPE, EngineCounters, RequestClosed, RequestOpened, StepBatch
from latentwatch.transport import codec
from latentwatch.transport.hello import Hello
from latentwatch.transport.report import Report
from latentwatch.transport.sink import ReceivedBatch, ReceivedReport
from latentwatch.watchlist.file import Feature, HookRows, Limit, ModelCard, Watchlist

SHA256 = "ab" * 32


def sparse(
    id: str, *, limit: Limit | None = None, severity: Severity = Severity.WARNING, skip: int = 0, label: str = ""
) -> Feature:
    return Feature(
        id=id,
        label=label or f"feature {id}",
        severity=severity,
        kind="sae",
        gate="exact",
        units="activation",
        limit=limit,
        skip_first_positions=skip,
    )


def probe(
    id: str, *, limit: Limit | None = None, severity: Severity = Severity.CRITICAL, skip: int = 0, label: str = ""
) -> Feature:
    return Feature(
        id=id,
        label=label or f"probe {id}",
        severity=severity,
        kind="probe",
        gate="none",
        units="logit",
        limit=limit,
        skip_first_positions=skip,
    )


def watchlist(features: Sequence[Feature], *, hooks: int = 1, sha256: str = SHA256) -> Watchlist:
    """Features dealt to hook points in order; the rows are zeros, since nothing here scores with them."""
    D = 8
    rows = []
    for i, part in enumerate(np.array_split(np.arange(len(features)), hooks)):
        here = tuple(features[j] for j in part)
        dense = np.array([f.dense for f in here])
        scale = np.zeros((6, len(here)), np.float32)
        scale[0], scale[1], scale[3] = np.where(dense, -np.inf, 0), 1, np.where(dense, -np.inf, 0)
        zeros = np.zeros((len(here), D), np.uint16)
        rows.append(HookRows(HookPoint(i), here, zeros, zeros, scale))
    model = ModelCard("toy", "LlamaForCausalLM", D, hooks, 32, ("float32",))
    return Watchlist("synthetic", model, tuple(rows), sha256=sha256)


def received(sequence: int, batch: StepBatch) -> ReceivedBatch:
    """The batch as it comes out of a stream."""
    return ReceivedBatch(sequence, batch, codec.encode_batch(sequence, batch))


def received_report(sequence: int, report: Report) -> ReceivedReport:
    """The report as it comes out of a stream."""
    return ReceivedReport(sequence, report, codec.encode_report(sequence, report))


def hello(**changes: Any) -> Hello:
    fields: dict[str, Any] = {
        "replica": "pod-0/0",
        "boot_id": "0" * 32,
        "engine": "0",
        "model_name": "toy",
        "watchlist_sha256": SHA256,
        "armed": True,
        "not_armed_reason": "",
        "not_armed_text": "",
        "plugin_version": "0.1.0",
        "engine_version": "0.32.0",
    }
    return Hello(**{**fields, **changes})


@dataclass
class Tokens:
    """One request, token by token. T tokens; unscored ones have a state other than SCORED or INHERITED."""

    handle: int
    prompt_tokens: int
    act_TF: np.ndarray
    """Activations, 0 where a sparse feature does not fire; dense columns hold scores that float16 can hold."""
    state_T: np.ndarray
    norm_TH: np.ndarray
    outcome: Outcome = Outcome.FINISHED
    request_id: str = ""
    response_id: str = ""
    """Of a server's request, unless given: its id without the hex digits that the engine puts behind it."""

    def __post_init__(self) -> None:
        self.request_id = self.request_id or f"chatcmpl-{self.handle}-0123abcd"
        if "cmpl-" in self.request_id:
            self.response_id = self.response_id or self.request_id.rpartition("-")[0]

    @property
    def total(self) -> int:
        return len(self.act_TF)

    @property
    def seen_T(self) -> np.ndarray:
        return np.isin(self.state_T, (TokenState.SCORED, TokenState.INHERITED))

    def opened(self) -> RequestOpened:
        return RequestOpened(self.handle, self.request_id, self.prompt_tokens, response_id=self.response_id)

    def closed(self) -> RequestClosed:
        output = max(0, self.total - self.prompt_tokens + 1)
        counts = self.prompt_tokens, output, self.total
        return RequestClosed(self.handle, self.request_id, *counts, self.outcome, self.response_id)


def tokens(
    rng: np.random.Generator,
    features: Sequence[Feature],
    *,
    handle: int,
    total: int,
    prompt_tokens: int,
    hooks: int = 1,
    fire_rate: float = 0.2,
    unseen_share: float = 0.1,
) -> Tokens:
    """A random request. Values repeat often, so that ties between positions happen."""
    dense = np.array([f.dense for f in features])
    act = rng.choice([0.25, 0.5, 1.5, 4.0, 7.75], (total, len(features))).astype(np.float32)
    act[:, ~dense] *= rng.random((total, int((~dense).sum()))) < fire_rate
    act[:, dense] = rng.normal(0, 2, (total, int(dense.sum()))).astype(np.float16)
    state = rng.choice(
        [TokenState.SCORED, TokenState.INHERITED, TokenState.UNSEEN, TokenState.DROPPED],
        total,
        p=[0.8 * (1 - unseen_share), 0.2 * (1 - unseen_share), unseen_share / 2, unseen_share / 2],
    )
    norm = rng.uniform(1, 50, (total, hooks)).astype(np.float32)
    return Tokens(handle, prompt_tokens, act, state, norm)


@dataclass
class Piece:
    """Tokens `start` to `stop` of a request, to be computed in one step."""

    request: Tokens
    start: int
    stop: int


def step_batch(
    pieces: Sequence[Piece],
    features: Sequence[Feature],
    *,
    step: int = 1,
    time_unix_nano: int = 0,
    opened: Sequence[RequestOpened] = (),
    closed: Sequence[RequestClosed] = (),
    counters: EngineCounters | None = None,
    hooks: int = 1,
) -> StepBatch:
    """The batch of one step that computed these pieces."""
    sparse_F = np.array([not f.dense for f in features])
    segments, act, norm = [], [], []
    for piece in pieces:
        request = piece.request
        segments += list(_segments(request, piece.start, piece.stop))
        seen = np.flatnonzero(request.seen_T[piece.start : piece.stop]) + piece.start
        act.append(request.act_TF[seen])
        norm.append(request.norm_TH[seen])
    act_RF = np.concatenate(act) if act else np.empty((0, len(features)), np.float32)
    row, feature = np.nonzero((act_RF != 0) & sparse_F)
    fires = np.empty(len(row), FIRE_DTYPE)
    fires["row"], fires["feature"], fires["act"] = row, feature, act_RF[row, feature]
    return StepBatch(
        step=step,
        time_unix_nano=time_unix_nano,
        segments_S=np.array(segments, SEGMENT_DTYPE),
        fires_N=fires,
        dense_RP=act_RF[:, ~sparse_F].astype(np.float16),
        norm_RH=np.concatenate(norm) if norm else np.empty((0, hooks), np.float32),
        opened=tuple(opened),
        closed=tuple(closed),
        counters=counters or EngineCounters(),
    )


def _segments(request: Tokens, start: int, stop: int) -> Iterator[tuple[int, ...]]:
    """Runs of equal state within one phase, as segment records."""
    reasons = {TokenState.UNSEEN: Reason.PREFIX_CACHE, TokenState.DROPPED: Reason.RING_FULL}
    begin = start
    for position in range(start + 1, stop + 1):
        if (
            position < stop
            and request.state_T[position] == request.state_T[begin]
            and position != request.prompt_tokens
        ):
            continue
        state = TokenState(request.state_T[begin])
        phase = Phase.PROMPT if begin < request.prompt_tokens else Phase.OUTPUT
        yield (request.handle, begin, position - begin, state, reasons.get(state, Reason.NONE), phase)
        begin = position


@dataclass
class Schedule:
    """A way to run requests: which pieces each step computes, in order."""

    steps: list[list[Piece]] = field(default_factory=list)

    @classmethod
    def one_step(cls, requests: Sequence[Tokens]) -> Schedule:
        return cls([[Piece(r, 0, r.total) for r in requests]])

    @classmethod
    def random(cls, rng: np.random.Generator, requests: Sequence[Tokens], longest: int) -> Schedule:
        """Every request advances by 0 to `longest` tokens a step, in an order that changes from step to step."""
        at = {r.handle: 0 for r in requests}
        steps: list[list[Piece]] = []
        while any(at[r.handle] < r.total for r in requests):
            pieces = []
            for i in rng.permutation(len(requests)):
                request = requests[i]
                start = at[request.handle]
                stop = min(request.total, start + int(rng.integers(0, longest + 1)))
                if stop > start:
                    pieces.append(Piece(request, start, stop))
                    at[request.handle] = stop
            if pieces:
                steps.append(pieces)
        return cls(steps)

    def batches(self, features: Sequence[Feature], *, hooks: int = 1) -> list[StepBatch]:
        """The steps as batches, with each request opened by its first piece's step and closed by its last one's."""
        batches, begun = [], set()
        for number, pieces in enumerate(self.steps, start=1):
            fresh = [p.request for p in pieces if p.request.handle not in begun]
            begun |= {r.handle for r in fresh}
            batches.append(
                step_batch(
                    pieces,
                    features,
                    step=number,
                    opened=[r.opened() for r in fresh],
                    closed=[p.request.closed() for p in pieces if p.stop == p.request.total],
                    hooks=hooks,
                )
            )
        return batches
