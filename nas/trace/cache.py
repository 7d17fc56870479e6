"""Traces on disk: one SQLite file that several processes may read and write at once.

A row is found only under the torch version and the source code that made it, so a change of a block or of the tracer
never meets an old trace. What cannot be read or written is traced again: the cache changes the time, never a number.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from nas import registry
from nas.network import BlockSpec
from nas.op import Op
from nas.paths import cache_dir
from nas.trace.record import Trace

_FILE = "traces.sqlite3"
_WAIT_SECONDS = 30.0  # for another process's write to end


def load(spec: BlockSpec, batch: int) -> Trace | None:
    """The stored trace, or None."""
    try:
        with _open() as connection:
            row = connection.execute("SELECT trace FROM traces WHERE name = ?", (_name(spec, batch),)).fetchone()
    except sqlite3.OperationalError:  # locked for too long, or a folder that may not be written to
        return None
    except sqlite3.DatabaseError:  # half a file after a crash of the machine
        path().unlink(missing_ok=True)
        return None
    return None if row is None else _decode(row[0])


def store(spec: BlockSpec, batch: int, trace: Trace) -> None:
    """Keeps a trace for later processes, if the cache can be written."""
    try:
        with _open() as connection, connection:
            connection.execute("INSERT OR REPLACE INTO traces VALUES (?, ?)", (_name(spec, batch), _encode(trace)))
    except sqlite3.DatabaseError:
        return


def path() -> Path:
    """The cache file."""
    return cache_dir() / _FILE


@contextmanager
def _open() -> Iterator[sqlite3.Connection]:
    # One connection per call: cheap beside a trace, and safe after a fork and between threads.
    with closing(sqlite3.connect(path(), timeout=_WAIT_SECONDS)) as connection:
        # What a power cut could destroy can be traced again; waiting for the disk 3,000 times takes a minute.
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("CREATE TABLE IF NOT EXISTS traces (name TEXT PRIMARY KEY, trace TEXT NOT NULL)")
        yield connection


def _name(spec: BlockSpec, batch: int) -> str:
    return f"{spec.kind}-{spec.key}-{batch}-{code_hash(spec.kind)}"


@cache
def code_hash(kind: str) -> str:
    """A hash of everything besides the spec that decides a trace."""
    digest = hashlib.sha256(torch.__version__.encode())
    registry.load("nas.blocks", kind)  # says which kinds there are, where this is none of them
    # A block given as a file outside the tree is named by its path.
    block = Path(kind) if kind.endswith(".py") else _source(f"nas.blocks.{kind}")
    for file in (*_with_imports(block), _source("nas.op"), _source("nas.trace"), _source("nas.trace.recorder")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _with_imports(block: Path) -> list[Path]:
    """A block's file and those of nas.blocks that it is made of, however far down."""
    found: dict[Path, None] = {}
    todo = [block]
    while todo:
        file = todo.pop()
        if file in found:
            continue
        found[file] = None
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "nas.blocks":
                names = [f"nas.blocks.{alias.name}" for alias in node.names]
                todo += [Path(str(spec.origin)) for spec in map(find_spec, names) if spec is not None]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nas.blocks."):
                todo.append(_source(str(node.module)))
    return sorted(found)


def _source(module: str) -> Path:
    spec = find_spec(module)
    assert spec is not None  # our own modules
    return Path(str(spec.origin))


def _encode(trace: Trace) -> str:
    ops = [(o.kind, o.macs, o.weight_bytes, o.read_bytes, o.written_bytes, o.shape) for o in trace.ops]
    return json.dumps({"params": trace.params, "peak_bytes": trace.peak_bytes, "ops": ops}, separators=(",", ":"))


def _decode(text: str) -> Trace:
    data = json.loads(text)
    ops = tuple(
        Op(
            kind=kind,
            macs=macs,
            weight_bytes=weight_bytes,
            read_bytes=read_bytes,
            written_bytes=written_bytes,
            shape=tuple(shape),
        )
        for kind, macs, weight_bytes, read_bytes, written_bytes, shape in data["ops"]
    )
    return Trace(ops=ops, params=data["params"], peak_bytes=data["peak_bytes"])
