"""What a collector's logic tells its partners: the one protocol of evidence, drift and the reports to a gateway.

Shape legend: K request slots, n requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

from latentwatch.aggregate.requests import RequestFeatures, StepView
from latentwatch.arrays import Array
from latentwatch.collector.requests import RequestSummary, TrackedRequest
from latentwatch.collector.served_names import Names
from latentwatch.step.batch import StepBatch
from latentwatch.transport.report import RequestRow


@dataclass(frozen=True)
class Step:
    """One engine step as it was merged."""

    model_name: str
    batch: StepBatch
    view: StepView
    exceedances: Array
    """EXCEEDANCE: those of `view` whose request has a slot."""
    exceeding_slots: Array
    """The slot of each one."""
    requests_K: Array
    """TrackedRequest by slot, None where it is free; rows of requests without a slot are in the one behind the last."""
    seconds: float


@dataclass(frozen=True)
class Ends:
    """Requests of one boot that ended together."""

    slots: Sequence[int]
    """Where each one sat; free for another request once every listener was told."""
    requests: Sequence[RequestSummary]
    features: RequestFeatures
    whole: Sequence[int]
    """Places in `requests` of those that were seen from their beginning, and with scores."""
    seconds: float


@dataclass(frozen=True)
class Eviction:
    """A running request that was let go: nothing more will be known of it, and its slot is free."""

    slot: int
    request: TrackedRequest


@dataclass(frozen=True)
class RemoteRows:
    """Requests of other collectors, as one report tells of them."""

    rows: Sequence[RequestRow]
    requests: Sequence[RequestSummary]
    """How each one stands after its row; it goes on where the row has no outcome."""
    features: RequestFeatures
    whole: Sequence[int]
    """Places of those that ended, were seen from their beginning, and have scores."""
    seconds: float


class StepListener:
    """Is told what happens, in its order; what it does not care for it leaves. Must neither block nor raise."""

    def model_seen(self, model_name: str) -> None:
        """Something is said of this model; told again and again."""

    def names_gone(self, names: Names) -> None:
        """Nothing is counted under these model names and engines any more."""

    def owed_models(self) -> Set[str]:
        """Model names of which it still has to tell somebody; they do not go before it has."""
        return frozenset()

    def step(self, step: Step) -> None:
        """A step was merged."""

    def ended(self, ends: Ends) -> None:
        """Requests ended."""

    def evicted(self, eviction: Eviction) -> None:
        """A running request was let go."""

    def remote(self, remote: RemoteRows) -> None:
        """A report told of requests."""

    def forget(self, is_gone: Callable[[str], bool]) -> None:
        """Let go of what is held of the requests with these engine request ids."""

    def tick(self, now: float) -> None:
        """About a second passed."""

    def acknowledged(self, number: int) -> None:
        """The gateway holds every report up to this one."""
