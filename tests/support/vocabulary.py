"""Public names that say what they mean to someone who never saw this tree: the words that do not, and who uses them.

Pure: source text in, names out. Used by the contract test of the vocabulary and by `make bench-house`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

DIALECT = {
    "afar": "remote, forwarded",
    "anew": "resync, restart",
    "door": "listener, proxy",
    "elsewhere": "remote",
    "gather": "merge, collect",
    "greet": "admit, register",
    "held": "pending, stored, connected, acked or unconfirmed, whichever it is",
    "hold": "store, queue, delay",
    "keep": "store, retain, select",
    "keeps": "stores, retains",
    "kept": "stored, cached, retained",
    "laid": "attributed, placed",
    "learn": "apply, update",
    "leftovers": "backlog",
    "lose": "close, expire, drop",
    "meet": "register, connect",
    "mention": "merge, refresh",
    "note": "record, append; a text for a reader is a caption",
    "rarely": "limited, throttled",
    "ship": "assets, publish",
    "stage": "stack, environment; a step of a pipeline has a name of its own",
    "stakes": "priority",
    "take": "read, receive, reserve, ingest, pop",
    "taken": "read, reserved, used, claimed",
    "takes": "accepts, needs, reads",
    "turns": "queue, order",
}
"""A word of our own, and what people call the thing. The plain word depends on the thing: that is the reason for the
rule, since one word of the dialect stands for several things."""

ALLOWED = {
    "CollectorConfig.evidence_keep": "the option --evidence-keep is published; a field has its option's name",
    "Dialogue.turns": "a dialogue has turns: the word of everyone who writes of chats",
    "STAGE_DEPTH": "latentwatch_stage_depth is published, with a label `stage`",
    "STAGE_CAPACITY": "latentwatch_stage_capacity is published, with a label `stage`",
}
"""Names that may use a word of the dialect, and why: there it is the plain word, or a promise to others."""


@dataclass(frozen=True)
class PublicName:
    """A name that others import, call or read: where it is defined and what it is."""

    module: str
    line: int
    kind: str
    name: str
    """From the module on: `Ledger.take`, or `Ledger.__init__(kept)` for a parameter."""

    @property
    def dialect(self) -> list[str]:
        """The words of the dialect in the last part of the name."""
        last = self.name.rpartition("(")[2].rstrip(")") if self.kind == "parameter" else self.name.rpartition(".")[2]
        return [word for word in words(last) if word in DIALECT]


def words(identifier: str) -> list[str]:
    """`KeptScores`, `kept_scores` and `KEPT_SCORES` are all kept, scores."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", identifier)]


def public_names(module: str, source: str) -> Iterator[PublicName]:
    """The module itself, its functions, classes, constants, methods, parameters, fields and attributes of `self`.

    Names with a leading underscore are not public, nor is what stands inside a function; parameters count when their
    function is public, `__init__` and the like included.
    """
    if not module.rpartition(".")[2].startswith("_"):
        yield PublicName(module, 1, "module", module)
    yield from _of_body(module, "", ast.parse(source).body)


def _of_body(module: str, owner: str, body: list[ast.stmt]) -> Iterator[PublicName]:
    for node in body:
        match node:
            case ast.ClassDef():
                if _is_public(node.name):
                    yield PublicName(module, node.lineno, "class", owner + node.name)
                yield from _of_body(module, f"{owner}{node.name}.", node.body)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield from _of_function(module, owner, node)
            case ast.If() | ast.Try() | ast.With():
                for block in (node.body, getattr(node, "orelse", []), getattr(node, "finalbody", [])):
                    yield from _of_body(module, owner, block)
            case ast.Assign() | ast.AnnAssign():
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                kind = "field" if owner else "constant"
                for name in {n.id: n for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}:
                    if _is_public(name):
                        yield PublicName(module, node.lineno, kind, owner + name)


def _of_function(module: str, owner: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[PublicName]:
    dunder = node.name.startswith("__") and node.name.endswith("__")
    if _is_public(node.name):
        yield PublicName(module, node.lineno, "method" if owner else "function", owner + node.name)
    if _is_public(node.name) or dunder:
        arguments = node.args
        for arg in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
            if _is_public(arg.arg):
                yield PublicName(module, node.lineno, "parameter", f"{owner}{node.name}({arg.arg})")
    if owner:
        attributes = {
            n.attr: n.lineno
            for n in ast.walk(node)
            if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and ast.unparse(n.value) == "self"
        }
        for name, line in attributes.items():
            if _is_public(name):
                yield PublicName(module, line, "attribute", owner + name)


def _is_public(name: str) -> bool:
    return not name.startswith("_")
