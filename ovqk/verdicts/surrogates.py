"""Surrogates for heads and for a task's words: the draws under the `spectrum` and `token` nulls.

    spectrum  a head's own singular values between Haar frames: a head with the same spectrum that knows no token
    token     other words, alike in spelling and frequency: a task with the same form but without its meaning

A surrogate head or readout goes through the same functions that made the observed value.
"""

import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from ovqk.circuits.grams import FullCircuit, Gram, blocks
from ovqk.circuits.head_maps import CircuitMaps
from ovqk.circuits.maps import Decomposition
from ovqk.circuits.spectra import full_circuit_ratio
from ovqk.circuits.threads import CPU, each
from ovqk.config.schema import Circuit, VariableKind
from ovqk.metrics import METRICS, named
from ovqk.structure.model import Model
from ovqk.tasks.lookup import WordSet
from ovqk.tasks.readouts import RELATION_METRICS, SET_METRICS, SUBSPACE_METRICS, TOP_METRICS, InTop
from ovqk.tasks.task_readout import TaskReadout
from ovqk.tasks.words import Variable
from ovqk.verdicts.frames import FrameBatch, Frames, KeptFrames
from ovqk.verdicts.statistics import TIE

STAGES = (25, 50, 100, 200, 400)
"""Numbers of draws after which a test asks whether it needs more; then it makes all draws."""
CANDIDATES_STAGES = (25, 35, 50, 70, 100, 140, 200, 280, 400, 560, 780)
"""The same for candidates. Only their p is reported, so draws beyond the last one that counts would be wasted."""
CHUNK_ELEMENTS = 2**23  # elements that one side's frames hold at a time (64 MB in float64)
PART_ELEMENTS = 2**20  # elements of one side's frames that a thread takes at a time, so many that Python costs little
ATTEMPTS = 200  # tries to draw a set of different matched words
HALVES, PAIRS = "token", "token_pairs"


# --- heads ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FramedHeads(Decomposition):
    """Heads with the same singular values between frames; `Frames` computes their products with Grams."""

    frames: Frames

    def core(self, gram: Gram | None = None) -> Float[Tensor, "draw k k"]:
        """See `Decomposition`."""
        if gram is None:
            return super().core()
        root = self.sigma[0].double().sqrt()
        return self.frames.across(gram) * root[:, None] * root

    def left_gram(self, gram: Gram) -> Float[Tensor, "draw k k"]:
        """See `Decomposition`."""
        return self.frames.read_gram(gram)

    def right_gram(self, gram: Gram) -> Float[Tensor, "draw k k"]:
        """See `Decomposition`."""
        return self.frames.write_gram(gram)


@dataclass(frozen=True)
class FramedMaps:
    """One circuit for such heads, as readouts take it (`maps.CircuitMaps`)."""

    circuit: Circuit
    decomposition: FramedHeads

    def scores(
        self, query_rows: Float[Tensor, "query d_model"], key_rows: Float[Tensor, "key d_model"]
    ) -> Float[Tensor, "draw query key"]:
        """See `CircuitMaps`."""
        return self._queried(query_rows) @ self.decomposition.frames.answered(key_rows).mT

    def written(self, rows: Float[Tensor, "word d_model"]) -> Float[Tensor, "draw word d_model"]:
        """See `CircuitMaps`."""
        return self._queried(rows) @ self.decomposition.write.mT.to(rows)

    def _queried(self, rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "draw row k"]:
        """Return rows @ read diag(sigma)."""
        return self.decomposition.frames.queried(rows) * self.decomposition.sigma[0].to(rows)


def surrogate_heads(sigma: Float[Tensor, " rank"], frames: Frames) -> FramedHeads:
    """Return heads with these singular values between frames.

    Singular values beyond the frames' number of columns are dropped; they are zeros if the frames span every dimension
    that is left.
    """
    n, _, k = frames.read.shape
    return FramedHeads(frames.read, sigma[:k].to(frames.read).expand(n, k), frames.write, k, frames)


Measure = Callable[[CircuitMaps], Mapping[str, Tensor | InTop]]
"""Measures a batch of surrogates: metric -> [draw]."""


class FrameDraws:
    """Metric values for one head's surrogates, drawn when they are asked for; the same seed gives the same draws."""

    def __init__(
        self,
        circuit: Circuit,
        sigma: Float[Tensor, " k"],
        d_model: int,
        centred: bool,
        measure: Measure,
        seed: Sequence[int],
        kept: KeptFrames | None = None,
    ) -> None:
        """Take the head's singular values, and the function that measures a batch of its surrogates.

        Heads with the same seed share their frames; so do later cells, if the frames are `kept`. `measure` may be
        replaced later by a function that measures fewer metrics; the metrics that it leaves out keep their draws.
        """
        self.circuit, self.sigma, self.d_model, self.centred = circuit, sigma, d_model, centred
        self.measure, self.seed, self.kept = measure, tuple(seed), kept
        state = int(np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)[0] >> np.uint64(1))
        self.generator = torch.Generator().manual_seed(state)
        self._drawn: dict[str, list[float]] = {}
        self._open: list[tuple[str, int, InTop]] = []

    def first(self, count: int) -> dict[str, NDArray[np.float64]]:
        """Return at least `count` draws for every metric that is measured; the steps do not change the draws."""
        return first_of_each([self], count)[0]

    def missing(self, count: int) -> Iterator[FrameBatch]:
        """Yield, in batches, the frames of the draws that are yet to be made."""
        k = min(len(self.sigma), self.d_model - self.centred)
        n = count - self.count
        if self.sigma.device.type == "cpu":
            most = min(PART_ELEMENTS // (self.d_model * k), math.ceil(n / torch.get_num_threads()))
        else:
            most = CHUNK_ELEMENTS // (self.d_model * k)
        for some in blocks(n, max(1, most)):
            shape = 2 * (some.stop - some.start), self.d_model, k
            of = *self.shares_with, some.start, shape, str(self.sigma.device)
            yield FrameBatch.next(self.generator, shape, self.centred, of, self.kept)

    @property
    def shares_with(self) -> tuple[object, ...]:
        """Return a key that is equal for heads whose next draws use the same frames."""
        return self.seed, self.d_model, len(self.sigma), self.centred, self.count

    def measured(self, frames: Frames) -> dict[str, list[float] | InTop]:
        """Measure the surrogates between these frames; return plain numbers, as many small tensors would hold memory.

        Words that must still be ranked in the rest of the vocabulary stay open until `close`.
        """
        found = self.measure(FramedMaps(self.circuit, surrogate_heads(self.sigma, frames)))
        return {
            name: values if isinstance(values, InTop) else values.double().tolist() for name, values in found.items()
        }

    def keep(self, measured: Mapping[str, list[float] | InTop]) -> None:
        """Add these draws to those that were made before."""
        for name, values in measured.items():
            drawn = self._drawn.setdefault(name, [])
            if isinstance(values, InTop):
                self._open.append((name, len(drawn), values))
                values = values.by_source.mean(-1).tolist()
            drawn.extend(values)

    @property
    def open(self) -> list[InTop]:
        """Return the draws with words that have yet to be ranked in the rest of the vocabulary."""
        return [ranked for *_, ranked in self._open]

    def close(self) -> None:
        """Keep the draws that were open, when they are settled."""
        for name, start, ranked in self._open:
            values = ranked.by_source.mean(-1).tolist()
            self._drawn[name][start : start + len(values)] = values
        self._open = []

    @property
    def count(self) -> int:
        """The number of draws made so far."""
        return max(map(len, self._drawn.values()), default=0)

    @property
    def drawn(self) -> dict[str, NDArray[np.float64]]:
        """Metric -> [draw]."""
        return {name: np.array(values) for name, values in self._drawn.items()}


def first_of_each(draws: Sequence[FrameDraws], count: int) -> list[dict[str, NDArray[np.float64]]]:
    """Return the first draws for several heads (see `FrameDraws.first`), computed side by side in threads.

    Heads that share frames are a set. This thread makes their noise, one set after the other, and keeps the numbers in
    order; other threads measure the surrogates.
    """
    together: dict[tuple[object, ...], list[FrameDraws]] = {}
    for own in draws:
        together.setdefault(own.shares_with, []).append(own)

    def measured(
        part: tuple[list[FrameDraws], FrameBatch],
    ) -> tuple[FrameBatch, list[tuple[FrameDraws, dict[str, list[float] | InTop]]]]:
        heads, batch = part
        frames = batch.made(heads[0].sigma.device)
        return batch, [(own, own.measured(frames)) for own in heads]

    missing = ((heads, batch) for heads in together.values() for batch in heads[0].missing(count))
    for batch, found in each(measured, missing, draws[0].sigma.device if draws else CPU):
        batch.leave()
        for own, values in found:
            own.keep(values)
    for heads in together.values():  # a head that continues alone starts from the same state
        for own in heads[1:]:
            own.generator.set_state(heads[0].generator.get_state())
    InTop.settle([ranked for own in draws for ranked in own.open])
    for own in draws:
        own.close()
    return [own.drawn for own in draws]


def stages(most: int, of: Sequence[int] = STAGES) -> tuple[int, ...]:
    """Return the numbers of draws, up to this many, after which a test asks whether it needs more."""
    return *(stage for stage in of if stage < most), most


def surrogate_metrics(task: TaskReadout, layer: int, wanted: set[str], observed: Mapping[str, float]) -> Measure:
    """Return a function that measures surrogates for a head in this layer, as the head itself was measured.

    Metrics that rank words in the vocabulary are left open (see `FrameDraws.close`). If a value was observed, a
    trace ratio may be a bound that lies on the same side of it (see `full_circuit_ratio`), and ranking stops when too
    few words are left to reach the observed value.
    """
    model, readout = task.model, task.readout
    circuits = full_circuits(model, wanted)

    def measure(maps: CircuitMaps) -> dict[str, Tensor | InTop]:
        found: dict[str, Tensor | InTop] = {}
        if readout is not None and wanted & {*SET_METRICS, *RELATION_METRICS, *SUBSPACE_METRICS}:
            found |= readout.metrics(layer, maps, wanted - set(TOP_METRICS))
            found |= {
                name: _unless_below(top, observed.get(name, -math.inf))
                for name, top in readout.in_top(layer, maps, wanted).items()
            }
        for name, full in circuits.items():
            found[name] = full_circuit_ratio(maps.decomposition, full, observed.get(name))
        return {name: values for name, values in found.items() if name in wanted}

    return measure


def _unless_below(top: InTop, observed: float) -> InTop | Float[Tensor, " draw"]:
    """Return the word shares so far if all lie below the observed value, because open shares can only fall."""
    most = top.by_source.mean(-1)
    return most if bool((most < observed - TIE).all()) else top


def full_circuits(model: Model, wanted: set[str]) -> dict[str, FullCircuit]:
    """Return metric -> its full circuit's Grams, for the wanted metrics that are a full circuit's trace ratio.

    A metric is left out if the model has no such circuit; a single layer has no `ov_copying_block0`, for instance.
    """
    plain, found = model.spectral_vocabulary, dict[str, FullCircuit | None]()
    for name in named(lambda metric: metric.full_circuit):
        circuit = METRICS[name].circuit
        if name not in wanted or circuit is None:
            continue
        if "block0" in METRICS[name].needs:
            found[name] = model.block0_circuit(circuit)
        elif plain is not None:
            found[name] = plain.full_circuit(circuit)
    return {name: full for name, full in found.items() if full is not None}


# --- words ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WordDraws:
    """Surrogate variables for one token null, or the reason why there are none."""

    null: str
    variables: list[Variable]
    reason: str = ""


def draw_words(variable: Variable, count: int, seed: int) -> list[WordDraws]:
    """Draw surrogates for a causal variable, under the token nulls that its kind has.

    set       `token`: as many matched tokens, one for each word, none twice
    contrast  `token`: the read words are split into random halves and, independently, the write words; the halves are
              the same if the words read are the words written, as in the variable itself
              `token_pairs`: random pairs of tokens matched to the words
    """
    rng = random.Random(f"words {seed}")
    if variable.kind is VariableKind.contrast:
        halves = [_halved(variable, rng) for _ in range(count)]
        return [WordDraws(HALVES, halves), _matched(PAIRS, variable, count, rng)]
    return [_matched(HALVES, variable, count, rng)]


def subsamples(variable: Variable, count: int, share: float, seed: int) -> list[Variable]:
    """Draw the variable with this share of its words (or word pairs), without replacement."""
    rng = random.Random(f"subsamples {seed}")

    def some(sets: tuple[WordSet, ...], kept: list[int]) -> tuple[WordSet, ...]:
        return tuple(_picked(words, kept) for words in sets)

    drawn = []
    for _ in range(count):
        read = _kept(len(variable.read[0].words), share, rng)
        write = read if _same(variable.read, variable.write) else _kept(len(variable.write[0].words), share, rng)
        drawn.append(dataclasses.replace(variable, read=some(variable.read, read), write=some(variable.write, write)))
    return drawn


def _kept(n: int, share: float, rng: random.Random) -> list[int]:
    return sorted(rng.sample(range(n), max(2, round(share * n))))


def _picked(words: WordSet, kept: Sequence[int]) -> WordSet:
    return WordSet([words.words[i] for i in kept], words.ids[torch.tensor(kept)])


def _halved(variable: Variable, rng: random.Random) -> Variable:
    def halves(sets: tuple[WordSet, ...]) -> tuple[WordSet, ...]:
        pool = torch.cat([words.ids for words in sets])
        names = [word for words in sets for word in words.words]
        order = rng.sample(range(len(names)), len(names))
        middle = len(order) // 2
        return tuple(WordSet([names[i] for i in part], pool[part]) for part in (order[:middle], order[middle:]))

    read = halves(variable.read)
    write = read if _same(variable.read, variable.write) else halves(variable.write)
    return dataclasses.replace(variable, read=read, write=write)


def _same(read: tuple[WordSet, ...], write: tuple[WordSet, ...]) -> bool:
    """Say whether both sides are the same tokens in the same order."""
    return all(torch.equal(a.ids, b.ids) for a, b in zip(read, write, strict=True))


def _matched(null: str, variable: Variable, count: int, rng: random.Random) -> WordDraws:
    drawn: list[Variable] = []
    for _ in range(count):
        read = _matched_sets(variable.read, variable, rng)
        write = read if _same(variable.read, variable.write) else _matched_sets(variable.write, variable, rng)
        if read is None or write is None:
            n = sum(len(words.words) for words in variable.read)
            reason = f"the vocabulary has too few tokens matched to the {n} words of '{variable.name}'"
            return WordDraws(null, [], reason)
        drawn.append(dataclasses.replace(variable, read=read, write=write))
    return WordDraws(null, drawn)


def _matched_sets(sets: tuple[WordSet, ...], variable: Variable, rng: random.Random) -> tuple[WordSet, ...] | None:
    """Draw a matched token for every word in the sets, none twice; None if every attempt fails."""
    ids = [i for words in sets for i in words.ids.tolist()]
    if len(variable.band) < len(ids) + 2:  # the rest of the band is its centre
        return None
    for _ in range(ATTEMPTS):
        found, taken = dict[int, int](), set[int]()
        for word in rng.sample(ids, len(ids)):
            options = variable.matches[word]
            token = next((t for t in (options[rng.randrange(len(options))] for _ in range(20) if options)
                          if t not in taken), None)  # fmt: skip
            if token is None:
                break
            found[word] = token
            taken.add(token)
        if len(found) == len(ids):
            drawn = [[found[i] for i in words.ids.tolist()] for words in sets]
            return tuple(WordSet([f"#{i}" for i in tokens], torch.tensor(tokens)) for tokens in drawn)
    return None
