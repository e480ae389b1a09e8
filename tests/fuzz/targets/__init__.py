"""What is fuzzed: one target for each format that others write, with seeds and with what has to hold of any input.

Any bytes are refused by a named error of ours, or taken; what is taken is the same when it is written and read again.
"""

from __future__ import annotations

from tests.fuzz.targets.disk import DISK
from tests.fuzz.targets.documents import DOCUMENTS
from tests.fuzz.targets.sources import SOURCES
from tests.fuzz.targets.target import Target
from tests.fuzz.targets.wire import WIRE

TARGETS: dict[str, Target] = {target.name: target for target in (*WIRE, *DOCUMENTS, *DISK, *SOURCES)}
