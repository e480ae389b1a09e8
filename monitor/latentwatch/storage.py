"""What has to be whole on a disk: logs of framed records, folder locks, files that are replaced, files under a hash.

Logs. A frame has the length and the CRC-32 of its body. Reading goes from frame to frame and ends at the first that is
not whole; `Tail` says why. A torn frame is one that was being written when the writer died, and counts as never
written; anything else that is no frame is damage, and so is a length that points past the end of the file while a
whole frame stands behind it. Neither is guessed across: what is read is the beginning of what was written. What a
reader makes of damage (refuse, count, begin again) is its own matter.

Locks go with the process, however it ends. A file that is replaced is the old one or the new one, on the disk too, at
every moment. An artifact is read back as it was written or refused.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import filelock
import numpy as np
import safetensors.numpy

from latentwatch.arrays import Array
from latentwatch.errors import Refusal, RefusalReason

_MISTAKES: Final = frozenset(
    {
        errno.ENOENT,
        errno.ENOTDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.EEXIST,
        errno.EINVAL,
        errno.ENOSYS,
    }
)
_SIZES: Final = struct.Struct("<II")  # bytes of the body, CRC-32
_METADATA_KEY: Final = "latentwatch"
_DIGEST_KEY: Final = "content_sha256"
_PLACES_AT_ONCE: Final = 1 << 18
_SEARCHED_BYTES: Final = 256 << 20
"""Checksummed at most in search of a whole frame behind a torn one: some tenths of a second."""


class Tail(Enum):
    """What stands where no whole frame does."""

    END = "nothing"
    TORN = "the beginning of a frame"
    DAMAGED = "no frame"


class Frame(NamedTuple):
    """One record of a log."""

    fields: tuple[Any, ...]
    body: bytes
    end: int
    """The byte behind it, where the next one begins."""


class Framing:
    """How the frames of one kind of log look: sizes, checksum and some fixed fields before each body."""

    def __init__(self, fields: str = "", *, covered: bool = True, max_body_bytes: int = (1 << 32) - 1) -> None:
        """Args: fields: as `struct` names them.   covered: they stand behind the checksum and are under it; else
        before it, and are not.
        """
        self._fields = struct.Struct("<" + fields)
        self._covered = covered
        self._max_body_bytes = max_body_bytes
        self.head_bytes = self._fields.size + _SIZES.size

    def pack(self, body: bytes, *fields: Any) -> bytes:
        """One frame. No body is empty: a hole in a file would look like it."""
        assert 0 < len(body) <= self._max_body_bytes, len(body)
        packed = self._fields.pack(*fields)
        sizes = _SIZES.pack(len(body), self._crc(packed, body))
        return (sizes + packed if self._covered else packed + sizes) + body

    def read(self, descriptor: int, at: int) -> Frame | Tail:
        """The frame at this place of an open file. Raises OSError."""
        head = os.pread(descriptor, self.head_bytes, at)
        if len(head) < self.head_bytes:
            return Tail.TORN if head else Tail.END
        length, crc = _SIZES.unpack_from(head, 0 if self._covered else self._fields.size)
        packed = head[_SIZES.size :] if self._covered else head[: self._fields.size]
        if not 0 < length <= self._max_body_bytes:
            return Tail.DAMAGED
        begin, size = at + self.head_bytes, os.fstat(descriptor).st_size
        if begin + length > size:
            return Tail.DAMAGED if self._frame_behind(descriptor, at + 1, size) else Tail.TORN
        body = os.pread(descriptor, length, begin)
        if len(body) < length or self._crc(packed, body) != crc:
            return Tail.DAMAGED
        return Frame(self._fields.unpack(packed), body, begin + length)

    def _crc(self, packed: bytes, body: bytes) -> int:
        return zlib.crc32(body, zlib.crc32(packed) if self._covered else 0)

    def _frame_behind(self, descriptor: int, at: int, size: int) -> bool:
        """Whether a whole frame stands anywhere behind: then what points past the end is no frame's beginning.

        Only at places whose length fits, and behind which the file ends or another length fits, is the checksum made.
        """
        data = np.frombuffer(os.pread(descriptor, size - at, at), np.uint8)
        last = len(data) - self.head_bytes
        summed = 0
        for first in range(0, max(0, last), _PLACES_AT_ONCE):
            places = np.arange(first, min(last, first + _PLACES_AT_ONCE))
            ends = self._ends(data, places)
            places, ends = places[ends > 0], ends[ends > 0]
            followed = (ends > last) | (self._ends(data, np.minimum(ends, last)) > 0)
            for place, end in zip(places[followed].tolist(), ends[followed].tolist(), strict=True):
                if isinstance(self.read(descriptor, at + place), Frame):
                    return True
                summed += end - place
                if summed > _SEARCHED_BYTES:
                    return False
        return False

    def _ends(self, data: Array, places: Array) -> Array:
        """Where frames at these places of the bytes would end; 0 where none can stand. int64."""
        first = places + (0 if self._covered else self._fields.size)
        length = sum(data[first + i].astype(np.int64) << (8 * i) for i in range(4))
        ends = places + self.head_bytes + length
        fits: Array = np.where((length > 0) & (length <= self._max_body_bytes) & (ends <= len(data)), ends, 0)
        return fits


class FrameReader:
    """Goes through the frames of an open file, from the byte `at` on; behind the last one, `tail` says what follows."""

    def __init__(self, file: BinaryIO, framing: Framing, at: int = 0) -> None:
        self._descriptor = file.fileno()
        self._framing = framing
        self.at = at
        self.tail = Tail.END

    def __iter__(self) -> Iterator[Frame]:
        while isinstance(frame := self._framing.read(self._descriptor, self.at), Frame):
            self.at = frame.end
            yield frame
        self.tail = frame


class FramedLog:
    """A file that one writer appends frames to. They are put together and handed to the system by `commit`."""

    def __init__(
        self, path: Path, framing: Framing, head: bytes = b"", *, replace: bool = False, mode: int = 0o600
    ) -> None:
        """Begin the file with `head`. Raises OSError: then there is none; FileExistsError unless `replace`."""
        self.path = path
        self.size = 0
        """Bytes in the file: what was committed."""
        self._framing = framing
        self._pending = [head]
        self._torn = False
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | (os.O_TRUNC if replace else os.O_EXCL)
        self._descriptor = os.open(path, flags, mode)
        try:
            self.commit()
        except OSError:
            self.close()
            with contextlib.suppress(OSError):
                path.unlink()
            raise

    def put(self, body: bytes, *fields: Any) -> None:
        """Have the next `commit` write a frame."""
        self._pending.append(self._framing.pack(body, *fields))

    def commit(self) -> None:
        """Hand what was put to the operating system: from then on the death of the process costs nothing.

        Raises OSError: then none of it counts as written, and the next call tries all of it again.
        """
        if self._torn:
            os.ftruncate(self._descriptor, self.size)
        data = b"".join(self._pending)
        self._torn = True
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self.size)
            raise
        self._torn = False
        self._pending.clear()
        self.size += len(data)

    def sync(self) -> None:
        """Have the disk hold what was committed: from then on the death of the host costs nothing. Raises OSError."""
        os.fdatasync(self._descriptor)

    def duplicate(self) -> FramedLog:
        """The same file for another thread, to sync and close there; this one may be closed meanwhile."""
        other = copy.copy(self)
        other._descriptor, other._pending = os.dup(self._descriptor), []
        return other

    def close(self) -> None:
        """Let go of the file, without what was not committed. May be called again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def is_mistake(error: OSError) -> bool:
    """Whether a path can be no folder of ours, whatever becomes of the disk; else it may be full, or away for a while.

    ENOSYS: its file system has no locks.
    """
    return error.errno in _MISTAKES


def lock_folder(folder: Path, name: str = "lock") -> filelock.BaseFileLock | None:
    """A folder's lock, until it is released or this process ends; None where another has it.

    Raises OSError, on a file system without such locks too: a file that only marks a lock would outlive a kill.
    """
    folder.stat()  # filelock would make a folder that is not there
    lock = filelock.FileLock(folder / name, timeout=0, mode=0o600, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        return None
    except NotImplementedError as error:  # how older versions say it, which know no `fallback_to_soft`
        raise _no_locks(folder) from error
    if isinstance(lock, filelock.SoftFileLock):  # what those in between made of it
        lock.release()
        raise _no_locks(folder)
    return lock


def _no_locks(folder: Path) -> OSError:
    return OSError(errno.ENOSYS, "its file system has no locks", str(folder))


def new_file(path: Path, *, private: bool = True) -> BinaryIO:
    """A file that was not there, to write. Raises OSError, FileExistsError for a link too.

    Args: private: for this user alone (0600); else as the umask says.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o600 if private else 0o666), "wb")


@contextlib.contextmanager
def atomic_write(path: Path, *, private: bool = True) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` once it is whole on the disk; after any failure none is left.

    It is a file of its own from the first byte on: a link that somebody put there is replaced, and not followed.

    Args:   private: see new_file.
    Raises: OSError: then `path` is what it was, or the new file where only syncing its folder failed.
    """
    partial = path.with_name(path.name + ".partial")
    # Of a writer that was killed; in a folder that others may write to, theirs, which fails here or is gone.
    partial.unlink(missing_ok=True)
    try:
        with new_file(partial, private=private) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Have the disk hold what was written to a file, by whomever. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Have a new, renamed or removed name in this folder survive a host that loses power. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Filesystems that know no syncing of folders, such as some in user space, answer these.
        if error.errno not in (errno.EBADF, errno.EINVAL):
            raise
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class HashedArtifact:
    """A kind of file: tensors as .safetensors, a JSON card in its metadata, and in the card a SHA-256 over both."""

    kind: str
    format: str
    """Name and version, which the card has."""
    max_bytes: int
    command: str
    """What writes such files."""
    again: str
    """The sentence that says how to make one anew."""
    refusal: type[Refusal]
    missing: RefusalReason
    """Reason of refusal for a file that cannot be read."""
    damaged: RefusalReason
    """Reason of refusal for one that is not what was written, or of another format."""
    ascii_card: bool = False
    """Whether the card's text is escaped. Part of the format: the digest is over that text."""

    def to_bytes(self, card: Mapping[str, Any], tensors: Mapping[str, Array]) -> bytes:
        """The file."""
        whole = {"format": self.format, **card}
        whole[_DIGEST_KEY] = self._digest(whole, tensors)
        return bytes(safetensors.numpy.save(dict(tensors), {_METADATA_KEY: self._text(whole)}))

    def write(self, data: bytes, path: Path) -> str:
        """Put a file's bytes at `path`, whole or not at all; their SHA-256, as `sha256sum` has it. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not private: an image or a volume has it for whoever runs there, and a reader checks its hash.
        with atomic_write(path, private=False) as file:
            file.write(data)
        return hashlib.sha256(data).hexdigest()

    def read(self, path: Path) -> bytes:
        """A file's bytes, unchecked. Raises the refusal."""
        what, instead = f"{self.kind} {path}", f"Give the file that '{self.command}' wrote."
        try:
            with path.open("rb") as file:
                data = file.read(self.max_bytes + 1)
        except OSError as error:
            found = f"it cannot be read ({error.strerror})"
            raise self.refusal(what, found=found, instead=instead, reason=self.missing) from error
        if len(data) > self.max_bytes:
            found = f"it has more than {self.max_bytes} bytes"
            raise self.refusal(what, found=found, instead=instead, reason=self.damaged)
        return data

    def parse(self, data: bytes, what: str) -> tuple[dict[str, Any], dict[str, Array]]:
        """Card and tensors as they were written; `what` names the bytes in errors. Raises the refusal."""
        try:
            tensors = safetensors.numpy.load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            card = json.loads(header["__metadata__"][_METADATA_KEY])
            if not isinstance(card, dict):
                raise TypeError(f"its card is {type(card).__name__}, not an object")
        except Exception as error:
            # safetensors raises its own error, which is no ValueError, and plain ones; all mean the same to the reader.
            found = f"not a whole {self.kind} file ({type(error).__name__}: {str(error)[:120]})"
            raise self.refusal(what, found=found, instead=self._mend, reason=self.damaged) from error
        if card.get("format") != self.format:
            found = f"format {card.get('format')!r}, this version reads {self.format!r}"
            raise self.refusal(what, found=found, instead=self.again, reason=self.damaged)
        if card.pop(_DIGEST_KEY, None) != self._digest(card, tensors):
            found = "its content is not what was written: the file is damaged"
            raise self.refusal(what, found=found, instead=self._mend, reason=self.damaged)
        return card, tensors

    @property
    def _mend(self) -> str:
        return f"Copy it again from where it is whole. {self.again}"

    def _text(self, card: Mapping[str, Any]) -> str:
        return json.dumps(card, sort_keys=True, ensure_ascii=self.ascii_card)

    def _digest(self, card: Mapping[str, Any], tensors: Mapping[str, Array]) -> str:
        """Over the card without its own digest, and over every tensor's name, form and bytes."""
        digest = hashlib.sha256(self._text(card).encode("utf-8", "surrogatepass"))
        for name, array in sorted(tensors.items()):
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode("utf-8", "surrogatepass"))
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()
