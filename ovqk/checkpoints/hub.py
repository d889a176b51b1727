"""Models on the hub: only tensors that ovqk reads are fetched, and only if no cache holds them.

Whole files go to the Hugging Face cache, where other programs find them. If ovqk reads only a small part of a shard,
that part alone is fetched, by byte ranges, into a smaller file in ovqk's own cache. Either is complete or not there.
"""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ovqk.checkpoints.files import (
    ADAPTER,
    CONFIG,
    INDEX,
    SINGLE,
    TOKENIZER_FILES,
    adapter_alone,
    cache_folder,
    file_hash,
    names_by_shard,
    notes_on_others,
    read_config,
    remember,
)
from ovqk.checkpoints.hub_timeout import Bar, Patience, UnansweredError, one_message
from ovqk.checkpoints.shards import Header, Read, is_part, read_header, write_part
from ovqk.config.schema import ModelConfig
from ovqk.errors import UserError
from ovqk.locks import locked

SHARE = 0.5
"""Share of a shard's bytes: if ovqk reads more, the whole file is fetched, which other programs can use too."""
CHUNK = 2**24  # bytes in one request, which are in memory at a time
REMEMBERED = 300.0
"""Seconds for which a repository is not asked for again after its hub could not be reached, or fell silent."""
READ = "attention, norms, embeddings and the first MLP"

Reads = Callable[[Mapping[str, Any]], Callable[[str], bool] | None]
"""config.json -> which tensors are read, by name; None: all of them."""


@dataclass(frozen=True)
class Snapshot:
    """A repository's files on this machine, at one commit.

    Attributes:
        directory: holds config.json and the tokenizer's files; for a model that the bridge reads, everything.
        shards: the files, whole or smaller, that hold the tensors ovqk reads.
        hashes: file name -> SHA-256 for every whole shard in the repository, whether it was fetched or not.
        commit: the commit that the revision resolved to.
        notes: on other checkpoints and adapters that the repository holds.
    """

    directory: Path
    shards: list[Path]
    hashes: dict[str, str]
    commit: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Survey:
    """What a repository holds, at one commit, as its headers tell.

    Attributes:
        directory: holds config.json and the tokenizer's files.
        shapes: tensor -> shape, of the shards that ovqk reads from.
        bytes_by_tensor: tensor -> its bytes in the file.
        to_fetch: bytes that ovqk would fetch now.
        whole: bytes of all shards.
    """

    directory: Path
    shapes: dict[str, tuple[int, ...]]
    bytes_by_tensor: dict[str, int]
    commit: str
    to_fetch: int
    whole: int


Found = TypeVar("Found")


def fetch(model: ModelConfig, label: str, timeout: float, reads: Reads | None = None) -> Snapshot:
    """Fetch the files that ovqk reads of a hub model and that no cache holds, and return all that it reads.

    A hub that could not be reached, or fell silent, is waited for once: within REMEMBERED seconds the same question
    (with the same timeout) in this process has the same answer at once, as for the other cells of a sweep.

    Args:
        model: the resolved model config.
        label: how messages name the model.
        timeout: seconds without anything new from the hub after which it is given up.
        reads: from config.json, which tensors are read; shards without any are not fetched.

    Raises:
        UserError: it is not available; the message says why and gives a remedy.
    """
    return _asked(model, label, timeout, reads, _Repository.snapshot)


def survey(model: ModelConfig, label: str, timeout: float, reads: Reads | None = None) -> Survey:
    """Look at a hub model without fetching any weights: config.json, the tokenizer's files and headers alone.

    Arguments and errors are those of `fetch`.
    """
    return _asked(model, label, timeout, reads, _Repository.survey)


def _asked(
    model: ModelConfig, label: str, timeout: float, reads: Reads | None, of: Callable[["_Repository"], Found]
) -> Found:
    """Answer a question about a repository; one that its hub did not answer has the same answer at once."""
    if not model.repo:
        raise UserError(f"model.repo: not set for model={model.name}. source=hub needs repo: OWNER/NAME.")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model.repo):
        raise UserError(f"model.repo={model.repo}: must be OWNER/NAME.")
    from huggingface_hub import constants

    question = (constants.ENDPOINT, constants.HF_HUB_OFFLINE, label, timeout)
    asked, answer = unanswered.get(question, (-REMEMBERED, ""))
    if time.monotonic() - asked < REMEMBERED:
        raise UnansweredError(answer)
    patience = Patience(timeout)
    try:
        with one_message(label, model.revision, patience), patience.kept():
            return of(_Repository(model.repo, model.revision, label, patience, reads))
    except UnansweredError as error:
        unanswered[question] = time.monotonic(), str(error)
        raise


unanswered: dict[tuple[str, bool, str, float], tuple[float, str]] = {}
"""Requests that the hub did not answer -> the time and the message."""


@dataclass(frozen=True)
class _Entry:
    """A file of the repository: its bytes, and its SHA-256 if it is a large one."""

    size: int
    sha256: str | None


@dataclass(frozen=True)
class _Wanted:
    """A shard to fetch, and how many bytes of it: all, or if there is a header, the tensors of these names."""

    shard: str
    size: int
    header: Header | None = None
    names: tuple[str, ...] = ()


class _Repository:
    """A repository at one commit: its files, those on this machine, and how the rest is fetched."""

    def __init__(self, repo: str, revision: str, label: str, patience: Patience, reads: Reads | None) -> None:
        """Resolve the revision and list the files."""
        from huggingface_hub import HfFileSystem

        self.repo, self.label, self.patience = repo, label, patience
        self.remote: Any = HfFileSystem(skip_instance_cache=True)
        self.directory = self._config(revision).parent
        self.commit = self.directory.name
        self.own = cache_folder() / "hub" / repo.replace("/", "--") / self.commit
        self.listing = self._listing()
        for name in (INDEX, *TOKENIZER_FILES):
            if name in self.listing:
                self._whole(name, self.commit)
        self.reads = None if reads is None else reads(read_config(self.directory, label))

    def snapshot(self) -> Snapshot:
        """Fetch the files that ovqk reads and this machine lacks, and return all that it reads."""
        names, needed = self._shards(), []
        for shard, promised in names.items():
            unread = self.reads is not None and promised and not any(map(self.reads, promised))
            if not unread or self.listing[shard].sha256 is None:
                needed.append(shard)
        missing = [shard for shard in needed if self._here(shard) is None]
        if missing:
            wanted = [self._wanted(shard, names[shard]) for shard in missing]
            self._fetch(wanted, sum(self.listing[shard].size for shard in names if self._here(shard) is None))
        paths = {shard: self._here(shard) or self.directory / shard for shard in needed}
        hashes = {shard: self.listing[shard].sha256 or file_hash(paths[shard]) for shard in names}
        notes = notes_on_others("the repository", self.listing, names)
        return Snapshot(self.directory, list(paths.values()), hashes, self.commit, notes)

    def survey(self) -> Survey:
        """Read the headers of the shards that ovqk reads from, and count what would be fetched."""
        names = self._shards()
        shapes, sizes, to_fetch = dict[str, tuple[int, ...]](), dict[str, int](), 0
        for shard, promised in names.items():
            if self.reads is not None and promised and not any(map(self.reads, promised)):
                continue
            here = self._here(shard)
            if here is None:
                item = self._wanted(shard, promised)
                to_fetch += item.size
                header = item.header or self._header(shard)
            else:
                with here.open("rb") as file:
                    header = read_header(partial(_at, file), here.stat().st_size)
            shapes |= {name: tuple(tensor["shape"]) for name, tensor in header.tensors.items()}
            sizes |= {name: header.size([name]) for name in header.tensors}
        return Survey(
            self.directory, shapes, sizes, self.commit, to_fetch, sum(self.listing[shard].size for shard in names)
        )

    # --- files that exist -------------------------------------------------------------------------------------

    def _config(self, revision: str) -> Path:
        """Return config.json's path in the Hugging Face cache; fetch it if it is missing.

        Raises:
            UserError: the repository holds none; the message tells if it holds an adapter alone.
        """
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return self._whole(CONFIG, revision)
        except LocalEntryNotFoundError:  # nothing more is asked of a hub that does not answer
            adapter = try_to_load_from_cache(self.repo, ADAPTER[0], revision=revision)
            if isinstance(adapter, str):
                raise UserError(f"{self.label}: {adapter_alone(Path(adapter).parent)}") from None
            raise
        except UserError as error:
            try:
                adapter_config = self._whole(ADAPTER[0], revision)
            except UserError:
                raise error from None
            raise UserError(f"{self.label}: {adapter_alone(adapter_config.parent)}") from None

    def _listing(self) -> dict[str, _Entry]:
        """Return the repository's files: as remembered, from the hub, or from the cache if the hub does not answer."""
        from huggingface_hub.errors import HTTPError

        memory = self.own / "listing.json"
        try:
            known = json.loads(memory.read_text(encoding="utf-8"))
            return {name: _Entry(**entry) for name, entry in known.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            pass
        try:
            if "/" not in self.repo:
                raise UserError(f"model.repo={self.repo}: not in the Hugging Face cache by this name; give OWNER/NAME.")
            files = [item for item in self.remote.ls(f"{self.repo}@{self.commit}") if item["type"] == "file"]
        except (UserError, HTTPError, OSError):
            held = [path for path in self.directory.iterdir() if path.is_file()]
            weights = {path.name: file_hash(path) for path in held if path.suffix == ".safetensors"}
            listing = {path.name: _Entry(path.stat().st_size, weights.get(path.name)) for path in held}
            sharded = INDEX in listing and SINGLE not in listing
            index = names_by_shard(self.directory, self.label) if sharded else {SINGLE: []}
            if not index.keys() <= listing.keys():
                raise
            return listing
        self.patience.renew()
        found = {Path(f["name"]).name: _Entry(f["size"], f["lfs"].sha256 if f["lfs"] else None) for f in files}
        remember(memory, {name: asdict(entry) for name, entry in found.items()})
        return found

    def _shards(self) -> dict[str, list[str]]:
        """Return each shard's file name -> the tensors that the index promises in it; no tensors if one file holds all.

        As transformers does, it takes model.safetensors if it exists, else the shards of the index.
        """
        if INDEX not in self.listing and SINGLE not in self.listing:
            if ADAPTER[1] in self.listing:
                if ADAPTER[0] in self.listing:
                    self._whole(ADAPTER[0], self.commit)
                raise UserError(f"{self.label}: {adapter_alone(self.directory)}")
            raise UserError(f"{self.label}: the repository holds no {SINGLE}; ovqk unpickles nothing.")
        shards = {SINGLE: []} if SINGLE in self.listing else names_by_shard(self.directory, self.label)
        missing = [shard for shard in shards if shard not in self.listing]
        if missing:
            raise UserError(
                f"{self.label}: {INDEX} names {', '.join(missing)}, which the repository does not hold. "
                "Another model.revision may be complete."
            )
        return shards

    def _here(self, shard: str) -> Path | None:
        """Return the shard in the Hugging Face cache, or the part of it in ovqk's own; None if neither holds it."""
        whole, part = self.directory / shard, self.own / shard
        if whole.is_file():
            return whole
        return part if self.reads is not None and is_part(part, self.reads) else None

    # --- files to fetch ---------------------------------------------------------------------------------------

    def _wanted(self, shard: str, promised: list[str]) -> _Wanted:
        """Return the whole shard, or only the part that is read if that saves most of its bytes."""
        entry = self.listing[shard]
        if self.reads is None or entry.sha256 is None or (promised and all(map(self.reads, promised))):
            return _Wanted(shard, entry.size)
        header = self._header(shard)
        names = tuple(filter(self.reads, header.tensors))
        size = header.size(names)
        return _Wanted(shard, entry.size) if size > SHARE * entry.size else _Wanted(shard, size, header, names)

    def _header(self, shard: str) -> Header:
        """Read a shard's header from the hub."""
        try:
            with self._ranges(shard) as read:
                return read_header(read, self.listing[shard].size)
        except ValueError as error:
            raise UserError(f"{self.label}: {shard} is no complete safetensors file on the hub ({error}).") from error

    def _fetch(self, wanted: list[_Wanted], total: int) -> None:
        """Announce the files to fetch, and fetch them."""
        from huggingface_hub import constants
        from rich.filesize import decimal

        self._check_room(Path(constants.HF_HUB_CACHE), "HF_HOME", [item for item in wanted if item.header is None])
        self._check_room(self.own, "OVQK_CACHE_DIR", [item for item in wanted if item.header is not None])
        size = sum(item.size for item in wanted)
        what = decimal(size) if size == total else f"{decimal(size)} of {decimal(total)}: {READ}"
        with _progress(f"{self.label}: fetching {what}", size) as advance:
            for item in wanted:
                self.patience.renew()  # the disk may have taken its time
                if item.header is None:
                    self._whole(item.shard, self.commit, advance)
                else:
                    self._part(item, item.header, advance)

    def _check_room(self, place: Path, key: str, wanted: list[_Wanted]) -> None:
        from rich.filesize import decimal

        size = sum(item.size for item in wanted)
        there = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
        free = shutil.disk_usage(there).free
        if size > free:
            raise UserError(
                f"{self.label}: {decimal(size)} must be fetched, but only {decimal(free)} are free. Free some "
                f"space, or move the cache to another disk with {key}."
            )

    def _whole(self, name: str, revision: str, advance: Callable[[int], None] = lambda size: None) -> Path:
        """Return a file's path in the Hugging Face cache; fetch the file if it is missing."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        bar: Any = partial(Bar, self.patience, advance)
        try:
            return Path(hf_hub_download(self.repo, name, revision=revision, tqdm_class=bar))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            raise UserError(f"{self.label}: the repository holds no {name}.") from error

    def _part(self, item: _Wanted, header: Header, advance: Callable[[int], None]) -> None:
        """Write the part of a shard that is read to ovqk's own cache; another process that does so is waited for."""
        assert self.reads is not None
        self.own.mkdir(parents=True, exist_ok=True)
        with locked(self.own / f"{item.shard}.lock", f"{self.label}, {item.shard}"):
            self.patience.renew()
            if is_part(self.own / item.shard, self.reads):
                return
            with self._ranges(item.shard) as read:

                def pieces() -> Iterator[bytes]:
                    for offset, length in header.runs(item.names):
                        for start in range(0, length, CHUNK):
                            piece = read(offset + start, min(CHUNK, length - start))
                            advance(len(piece))
                            yield piece

                write_part(self.own / item.shard, header, item.names, pieces())

    @contextmanager
    def _ranges(self, shard: str) -> Iterator[Read]:
        """Yield a reader of byte ranges from a file on the hub."""
        with self.remote.open(f"{self.repo}@{self.commit}/{shard}", "rb", cache_type="none") as file:

            def read(offset: int, length: int) -> bytes:
                file.seek(offset)
                data = file.read(length)
                if len(data) != length:
                    raise UserError(
                        f"{self.label}: {shard} arrived incomplete: {len(data)} bytes from byte {offset} on instead of "
                        f"{length}. Run it again; if that recurs, check the network between this machine and the hub."
                    )
                self.patience.renew()
                return bytes(data)

            yield read


def _at(file: BinaryIO, offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)


@contextmanager
def _progress(text: str, size: int) -> Iterator[Callable[[int], None]]:
    """Announce a download on standard error; yield a function that takes the bytes received, for a progress bar."""
    from huggingface_hub.utils import are_progress_bars_disabled
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True, highlight=False)
    console.print(text, markup=False, soft_wrap=True)
    if not console.is_terminal or are_progress_bars_disabled():
        yield lambda size: None
        return
    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        yield partial(progress.advance, progress.add_task("", total=size))
