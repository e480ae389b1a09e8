"""Which requests a collector hears of, although batches with their beginning or their end were dropped.

The guarantee. A request of which a collector hears anything, its beginning or tokens of it, has its end told, once: an
end that was dropped goes with a later batch. One of which no collector hears anything is counted instead.

Pure: no thread, file or clock.
"""

from __future__ import annotations

from dataclasses import replace

from latentwatch.step.batch import RequestClosed, StepBatch


class RequestEnds:
    """For the batches of one boot, dropped or not."""

    def __init__(self) -> None:
        self._untold: set[int] = set()
        """Handles of requests whose beginning was dropped, and of which no collector will hear anything else so far."""
        self._heard_of: set[int] = set()
        """Handles of requests in what goes to a collector while older batches wait, in which they may have begun."""
        self._owed: list[RequestClosed] = []
        """Ends that were dropped, of requests whose beginning was not."""
        self._refused: set[int] = set()
        """Handles of requests whose end a collector refused once."""

    @property
    def owes(self) -> bool:
        """Whether an end has to be told."""
        return bool(self._owed)

    @property
    def any_untold(self) -> bool:
        """Whether `told` makes a difference for a batch before which nothing waits."""
        return bool(self._untold)

    def with_owed(self, batch: StepBatch) -> StepBatch:
        """The batch with the ends that have to be told as well."""
        if not self._owed:
            return batch
        owed, self._owed = self._owed, []
        return replace(batch, closed=(*owed, *batch.closed))

    def told(self, batch: StepBatch, *, older_wait: bool) -> None:
        """Collectors will hear of the requests in it. `older_wait`: a batch before it may yet be dropped."""
        handles = {*batch.segments_S["handle"].tolist(), *(end.handle for end in batch.closed)}
        self._untold -= handles
        if older_wait:
            self._heard_of |= handles
        else:
            self._heard_of.clear()

    def dropped(self, batch: StepBatch) -> int:
        """No collector will hear of this batch; how many requests ended of which none hears anything at all."""
        self._untold.update({opened.handle for opened in batch.opened} - self._heard_of)
        return self._owe(batch, frozenset())

    def refused(self, batch: StepBatch) -> int:
        """A collector does not take this batch, or it cannot be encoded; how many ends are given up.

        A collector may have taken a part, so that its requests are not untold. Its ends are told once more only: it may
        be one of them that cannot be taken, and every batch that carried it would be refused.
        """
        ends = {closed.handle for closed in batch.closed}
        given_up = self._refused & ends
        self._refused ^= ends
        return self._owe(batch, given_up)

    def _owe(self, batch: StepBatch, given_up: set[int] | frozenset[int]) -> int:
        never_told = 0
        for closed in batch.closed:
            if closed.handle in self._untold or closed.handle in given_up:
                self._untold.discard(closed.handle)
                never_told += 1
            else:
                self._owed.append(closed)
        return never_told
