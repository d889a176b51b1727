"""A model's tables that depend on no task, kept for cells with other tasks and for other processes.

They are kept in parts, so that analyses which differ in one part share the others. An entry is a folder that holds one
part's Parquet tables, and `entry.json` with a hash for each. One rename brings it into being, so that it is never half
there; an entry that is damaged all the same is thrown away and computed again.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from ovqk.config.resolve import plain
from ovqk.errors import UserError
from ovqk.locks import locked
from ovqk.metrics import SCHEMA_VERSION
from ovqk.structure.kept import Kept
from ovqk.structure.model import Model
from ovqk.structure.stages import DirectionTables, Stage, StructureTables, Tables
from ovqk.whole_files import is_temporary, temporary

PACKAGE = Path(__file__).parents[1]
ENTRY = "entry.json"
GIGABYTE = 2**30
IN_MEMORY_UP_TO = 2**25
"""How many bytes the tables of a part may have that stay in memory once they were read, texts not counted."""


class Part(StrEnum):
    """The tables that one entry holds."""

    structure = "structure"  # heads, layers, spectra, offsets
    directions = "directions"
    composition = "composition"  # composition, virtual_heads


DEPENDS_ON: dict[Part, tuple[str, ...]] = {
    Part.structure: ("circuits", "offsets", "diagonals"),
    Part.directions: ("circuits", "components", "directions_embedding", "rare_tokens"),
    Part.composition: ("circuits", "pairs"),
}
"""The keys of the analysis that a part's tables depend on."""


@dataclass
class Entry:
    """The place of one part of a model in the cache while a cell needs it.

    Attributes:
        tables: the tables that were found; None if they have to be computed.
        folder: where it is kept; None if nothing can be kept.
        most: bytes that all entries together may have.
    """

    tables: Tables | None = None
    folder: Path | None = None
    most: float = 0.0

    def keep(self, tables: Tables) -> None:
        """Keep tables that were computed. A full disk leaves nothing behind and costs nothing but the keeping."""
        if self.folder is None:
            return
        unfinished = temporary(self.folder)
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            hashes = {}
            for name, table in tables.items():
                table.to_parquet(unfinished / f"{name}.parquet", index=False)
                hashes[name] = _hash((unfinished / f"{name}.parquet").read_bytes())
            (unfinished / ENTRY).write_text(json.dumps({"tables": hashes}), encoding="utf-8")
            unfinished.replace(self.folder)
            _forget_oldest(self.folder.parent, self.most)
        except OSError:
            shutil.rmtree(unfinished, ignore_errors=True)


class StructureCache:
    """A folder of entries, shared by processes."""

    def __init__(self, folder: Path, gigabytes: float, digest: str) -> None:
        """Take where it is, how large it may be, and the checkpoint's digest."""
        self.folder, self.most, self.digest = folder / "structure", gigabytes * GIGABYTE, digest

    def key(self, model: Model, part: Part, of: Any = None) -> str:
        """Hash everything that the part's tables depend on; `of` is what they depend on besides the model."""
        config = model.config
        analysis = plain(config.analysis)
        content = {
            "part": part.value,
            "of": of,
            "schema_version": SCHEMA_VERSION,
            "code": code_digest(),
            "weights": self.digest,
            "processing": config.processing.value,
            "seed": config.seed,
            "analysis": {name: analysis[name] for name in DEPENDS_ON[part]},
            "model": {name: getattr(config.model, name) for name in ("n_ctx", "causal", "attn_coeff")},
            "tokens": None if model.vocabulary is None else model.vocabulary.size,
            "spelled": model.tokenizer is not None,
            "block0_rows_listed": model.block0_side is not None,  # then Grams read the rows that lists keep
            "device": model.device.type,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    @contextmanager
    def entry(self, model: Model, part: Part, of: Any = None) -> Iterator[Entry]:
        """Open a part's entry. While one process computes it, others wait instead of computing it too; see `key`."""
        folder = self.folder / self.key(model, part, of)
        with ExitStack() as held:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                what = f"the cache's entry {folder.name}"
                held.enter_context(locked(self.folder / f".{folder.name}.lock", what))
            except (OSError, UserError):  # a read-only home, or a file system without locks: no cache
                yield Entry()
                return
            found = _read_once(model.kept, part, folder)
            if found is not None:
                held.close()
                with suppress(OSError):  # another process throws it away, or it is another user's
                    os.utime(folder / ENTRY)
            else:
                _clear_abandoned(self.folder, folder.name)
            yield Entry(found, folder, self.most)


@contextmanager
def entry_of(cache: StructureCache | None, model: Model, part: Part, of: Any = None) -> Iterator[Entry]:
    """Open a part's entry (`StructureCache.entry`); without a cache, an entry that finds and keeps nothing."""
    if cache is None:
        yield Entry()
        return
    with cache.entry(model, part, of) as entry:
        yield entry


class StructureParts:
    """A model's tables without a task: each part is found in the cache, or computed by its stage and then kept.

    Attributes:
        stages: the stages of the parts that were not found; each must visit every layer before `tables`.
    """

    def __init__(self, cache: StructureCache | None, model: Model, held: ExitStack) -> None:
        """Open the entries; `held` keeps their locks until the tables are made."""
        makers: dict[Part, type[StructureTables | DirectionTables]] = {Part.structure: StructureTables}
        if model.lists_tokens:
            makers[Part.directions] = DirectionTables
        self._entries = {part: held.enter_context(entry_of(cache, model, part)) for part in makers}
        self._made_by = {part: makers[part](model) for part, entry in self._entries.items() if entry.tables is None}

    @property
    def stages(self) -> list[Stage]:
        """See the class."""
        return list(self._made_by.values())

    def tables(self) -> Tables:
        """Return all parts' tables, and keep those that were computed."""
        made = Tables()
        for part, entry in self._entries.items():
            if entry.tables is None:
                found = self._made_by[part].tables(made)
                entry.keep(found)
            else:
                found = entry.tables
            made |= found
        return made


def _clear_abandoned(folder: Path, key: str) -> None:
    """Remove the entries that killed processes left half-written. The lock of this key is held, others are tried."""
    for left in folder.glob(".*.tmp"):
        other = left.name[1:].split(".")[0]
        if not is_temporary(left.name):
            continue
        with ExitStack() as held, suppress(OSError, UserError):  # another process is at work on it
            if other != key:
                held.enter_context(locked(folder / f".{other}.lock", other, wait=False))
            shutil.rmtree(left, ignore_errors=True)


def _read_once(kept: Kept | None, part: Part, folder: Path) -> Tables | None:
    """Return what `_read` does; small tables stay in memory for the process's next cells."""
    name, of = f"cache entry {part.value}", folder.name
    if kept is not None and kept.has(name, of):
        return kept.value(name, of, Tables)
    found = _read(folder)
    size = sum(int(table.memory_usage().sum()) for table in (found or {}).values())
    if kept is not None and found is not None and size <= IN_MEMORY_UP_TO:
        kept.value(name, of, lambda: found)
    return found


def _read(folder: Path) -> Tables | None:
    """Read an entry's tables; None if there is no whole entry, and the rest of a broken one is removed."""
    try:
        hashes = json.loads((folder / ENTRY).read_text(encoding="utf-8"))["tables"]
        tables = {}
        for name, expected in hashes.items():
            content = (folder / f"{name}.parquet").read_bytes()
            if _hash(content) != expected:
                raise ValueError(f"{name} is damaged")
            tables[name] = pd.read_parquet(io.BytesIO(content))
        return tables
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _forget_oldest(folder: Path, most: float) -> None:
    """Throw away entries, the longest unused first, until the rest is no larger than allowed.

    What a killed process left half-written is an entry that nobody uses.
    """
    entries = []
    for entry in folder.iterdir():
        try:
            files = [path.stat() for path in entry.iterdir()]
            used = max(status.st_mtime_ns for status in [entry.stat(), *files])
            entries.append((used, sum(status.st_size for status in files), entry))
        except OSError:  # a lock, or another process throws it away
            continue
    total = sum(size for _, size, _ in entries)
    for _, size, entry in sorted(entries):
        if total <= most:
            return
        shutil.rmtree(entry, ignore_errors=True)
        total -= size


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Hash ovqk's own modules and their places: no entry by other code is read, even if no version was bumped."""
    places = ((path.relative_to(PACKAGE).as_posix().encode(), path) for path in sorted(PACKAGE.rglob("*.py")))
    return _hash(b"".join(name + b"\0" + path.read_bytes() for name, path in places))


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
