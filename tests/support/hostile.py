"""Hosts that mean no good: what a container, a sandbox or a careless parent does to a process before it begins.

`World.argv` wraps a command: this file, run as a program of its own, does to itself what the world wants and becomes
the command. Of the system calls that nobody needs each answers the world's error, by a seccomp filter; where the
kernel takes none, the functions of Python's `os` that make them do, by a sitecustomize.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib.util
import json
import os
import platform
import pwd
import resource
import signal
import socket
import struct
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 10001
"""The user of our own image. No line of /etc/passwd is theirs, and none of a test machine's is expected to be."""
CALLS = {
    # name: number on x86_64, on aarch64
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "sched_setparam": (142, 118),
    "sched_setaffinity": (203, 122),
    "sched_getaffinity": (204, 123),
    "setpriority": (141, 140),
    "getpriority": (140, 141),
    "ioprio_set": (251, 30),
    "prctl": (157, 167),
    "mlock": (149, 228),
    "mlock2": (325, 284),
    "mlockall": (151, 230),
    "madvise": (28, 233),
    "fallocate": (285, 47),
    "fadvise64": (221, 223),
    "memfd_create": (319, 279),
    "setrlimit": (160, 164),
    "prlimit64": (302, 261),
    "setsid": (112, 157),
    "inotify_init1": (294, 26),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "sendfile": (40, 71),
    "copy_file_range": (326, 285),
    "splice": (275, 76),
    "close_range": (436, 436),
    "membarrier": (324, 283),
    "io_uring_setup": (425, 425),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "ptrace": (101, 117),
    "sysinfo": (99, 179),
    "getrusage": (98, 165),
    "sync_file_range": (277, 84),
    "timerfd_create": (283, 85),
    "rseq": (334, 293),
}
"""What a process of ours can do without. Without uname Python has no uuid, without getrandom OpenSSL no TLS."""
DECOYS = ("logging", "json", "random", "signal", "typing", "numpy", "grpc", "latentwatch", "encodings", "time")
FALLBACK = """
import errno, os, pwd
def refuse(*_, **__):
    raise OSError(ERROR, os.strerror(ERROR))
for name in ("sched_setscheduler", "sched_setaffinity", "sched_getaffinity", "setpriority", "nice", "memfd_create",
             "posix_fallocate", "posix_fadvise", "sendfile", "copy_file_range", "pidfd_open"):
    if ERROR and hasattr(os, name):
        setattr(os, name, refuse)
def nobody(user):
    raise KeyError(f"getpwuid(): uid not found: {user}")
pwd.getpwuid = nobody
"""


@dataclass(frozen=True)
class World:
    """What a process finds when it begins."""

    name: str
    error: str = ""
    """Of each optional system call; empty: they work."""
    umask: int = 0o022
    open_files: int = 0
    """Both limits; 0 leaves them."""
    streams: str = "kept"
    """kept, closed (0, 1 and 2), full (a full device), broken (a pipe that nobody reads)."""
    cwd: str = "decoys"
    """decoys (files with the names of modules), deleted, unreadable."""
    read_only: bool = False
    """All of the disk but the scratch folder; where this user may not have that, what its user may not write."""
    ignored: tuple[str, ...] = ()
    """Signals that the parent ignored."""
    unset: tuple[str, ...] = (
        "HOME",
        "USER",
        "LOGNAME",
        "LNAME",
        "USERNAME",
        "TERM",
        "XDG_CACHE_HOME",
        "LANG",
        "TMPDIR",
    )
    env: dict[str, str] = field(default_factory=dict)
    proxies: str = "http://{trap}"

    def argv(self, command: Sequence[str], folder: Path) -> list[str]:
        """The command in this world. `folder`: scratch, the user's own where the process runs as another one."""
        wanted = {**asdict(self), "folder": str(folder)}
        return [sys.executable, "-I", __file__, json.dumps(wanted), *command]

    def environment(self, trap: str, **more: str) -> dict[str, str]:
        """The process's environment. `trap`: host:port of a proxy that must not be asked."""
        kept = {
            name: value for name, value in os.environ.items() if name not in self.unset and "proxy" not in name.lower()
        }
        url = self.proxies.format(trap=trap)
        names = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        package = importlib.util.find_spec("latentwatch")
        assert package is not None and package.origin is not None
        path = os.pathsep.join((str(Path(package.origin).parents[1]), str(ROOT)))
        return {**kept, "PYTHONPATH": path, **dict.fromkeys(names, url), **self.env, **more}

    @property
    def prints(self) -> bool:
        """Whether what is printed arrives."""
        return self.streams == "kept"


WORLDS = (
    World(
        "sandbox",
        error="EPERM",
        umask=0o000,
        open_files=64,
        ignored=("SIGCHLD",),
        env={
            "PYTHONIOENCODING": "ascii",
            "LC_ALL": "C",
            "PYTHONUTF8": "0",
            "PYTHONCOERCECLOCALE": "0",
            "TZ": "Mars/Olympus_Mons,x",
        },
    ),
    World(
        "gvisor",
        error="ENOSYS",
        umask=0o777,
        streams="closed",
        cwd="deleted",
        env={"HOME": "/nonexistent", "LC_ALL": "xx_YY.nonsense", "TMPDIR": "/nonexistent/" + "t" * 120, "TZ": ""},
    ),
    World(
        "full",
        error="EINVAL",
        streams="full",
        cwd="unreadable",
        read_only=True,
        ignored=("SIGCHLD", "SIGPIPE"),
        proxies="socks5h://{trap}",
        env={"HOME": "/proc", "TMPDIR": "/proc", "PYTHONUNBUFFERED": "1", "WEB_CONCURRENCY": "auto", "TERM": "none"},
    ),
    World("unread", streams="broken", proxies="nonsense://{trap}:x", env={"FORWARDED_ALLOW_IPS": "nonsense"}),
)


@contextlib.contextmanager
def trap() -> Iterator[tuple[str, list[str]]]:
    """host:port of a proxy, and the requests that it was sent."""
    asked: list[str] = []
    listening = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(0.5)
                asked.append(connection.recv(200).decode(errors="replace"))

    threading.Thread(target=answer, daemon=True).start()
    try:
        yield f"127.0.0.1:{listening.getsockname()[1]}", asked
    finally:
        listening.close()


def give_away(folder: Path) -> None:
    """Make everything below the folder the other user's, where this one may: only root runs a process as another."""
    if os.geteuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)


# -- what follows runs in the process that becomes the command


def become(world: dict[str, object], command: list[str]) -> None:
    """Do to this process what the world wants, and run the command in its place."""
    folder = Path(str(world["folder"]))
    if world["read_only"]:
        _forbid_writing(folder)
    _change_folder(str(world["cwd"]), folder)
    for name in world["ignored"]:  # type: ignore[attr-defined]
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    if limit := int(str(world["open_files"])):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    changed = _change_user()
    error = str(world["error"])
    refused = _refuse_calls(getattr(errno, error)) if error else True
    if not (refused and changed):
        fallback = folder / "fallback"
        fallback.mkdir(exist_ok=True)
        (fallback / "sitecustomize.py").write_text(f"ERROR = {getattr(errno, error, 0)}\n" + FALLBACK)
        os.environ["PYTHONPATH"] = f"{fallback}{os.pathsep}{os.environ['PYTHONPATH']}"
    _change_streams(str(world["streams"]))
    os.umask(int(str(world["umask"])))
    os.execv(command[0], command)


def _change_folder(kind: str, folder: Path) -> None:
    place = folder / f"cwd-{os.getpid()}"
    place.mkdir()
    os.chdir(place)
    if kind == "deleted":
        place.rmdir()
    elif kind == "unreadable":
        place.chmod(0)
    else:
        for name in DECOYS:
            (place / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the working folder was imported')\n")
        give_away(place)


def _forbid_writing(folder: Path) -> None:
    """In a view of the disk that is this process's own, which only root may have."""
    libc = ctypes.CDLL(None, use_errno=True)
    bind, remount, read_only, private = 1 << 12, 1 << 5, 1, (1 << 18) | (1 << 14)
    if os.geteuid() == 0 and libc.unshare(0x00020000) == 0:  # CLONE_NEWNS
        libc.mount(b"none", b"/", None, private, None)
        libc.mount(bytes(folder), bytes(folder), None, bind, None)
        libc.mount(b"none", b"/", None, remount | bind | read_only, None)


def _change_user() -> bool:
    """Be a user whom no list knows, who may read what root may and write nothing else; False where it cannot be."""
    if os.geteuid() != 0:
        return False
    with contextlib.suppress(KeyError):
        pwd.getpwuid(NOBODY)
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    may_read = 1 << 2  # CAP_DAC_READ_SEARCH: the interpreter may lie in root's home
    libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    header = struct.pack("Ii", 0x20080522, 0)
    if libc.capset(header, struct.pack("6I", may_read, may_read, may_read, 0, 0, 0)) == 0:
        libc.prctl(47, 2, 2, 0, 0)  # PR_CAP_AMBIENT, RAISE
    return True


def _refuse_calls(number: int) -> bool:
    """Have the kernel answer each of CALLS with this error; False where it takes no filter."""
    column = {"x86_64": 0, "aarch64": 1}.get(platform.machine())
    if column is None:
        return False
    calls = [numbers[column] for numbers in CALLS.values()]
    # struct sock_filter: code, jump if true, jump if false, k.
    lines = [(0x20, 0, 0, 0)]  # load the number of the call
    lines += [(0x15, len(calls) - i, 0, call) for i, call in enumerate(calls)]
    lines += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050000 | number)]  # allow; or the error
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = struct.pack("HxxxxxxP", len(lines), ctypes.addressof(filters))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    return bool(libc.prctl(22, 2, program, 0, 0) == 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def _change_streams(kind: str) -> None:
    if kind == "closed":
        for number in range(3):
            os.close(number)
    elif kind == "full":
        opened = os.open("/dev/full", os.O_WRONLY)
        os.dup2(opened, 1)
        os.dup2(opened, 2)
        os.close(opened)
    elif kind == "broken":
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        os.close(reader)
        os.close(writer)


if __name__ == "__main__":
    become(json.loads(sys.argv[1]), sys.argv[2:])
