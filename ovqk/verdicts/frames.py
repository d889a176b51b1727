"""Haar frames for random heads: drawn batch by batch, and kept for a process's next cells.

All candidates' surrogates lie between the same frames, whatever the task, so that cells of one model share them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ovqk.circuits.grams import FLOAT64_UP_TO, Gram, Matrix, dense

KEPT_BYTES = 2**28
"""How many bytes of frames, with their products with Grams, a process keeps; later draws make theirs again."""


def gaussian(count: int, d_model: int, k: int, generator: torch.Generator) -> Float[Tensor, "draw d_model k"]:
    """Draw standard Gaussian matrices in float32: as random as float64, in an eighth of the time.

    Torch makes numbers in blocks of sixteen. Each matrix takes whole blocks, so the same matrices come out whatever the
    batch size.
    """
    padded = math.ceil(d_model * k / 16) * 16
    return torch.randn(count, padded, generator=generator)[:, : d_model * k].reshape(count, d_model, k)


def haar_frames(noise: Float[Tensor, "draw d_model k"], centred: bool) -> Float[Tensor, "draw d_model k"]:
    """Return orthonormal k-frames of R^d, Haar distributed; if `centred`, orthogonal to the all-ones vector.

    A frame is the Q of a Gaussian matrix whose R has a positive diagonal (Mezzadri 2007). If the matrix is well
    conditioned, it is found by Cholesky. If the matrix has at least four times as many rows as columns, or twice as
    many in a large model, float32 is exact enough and the frames are float32: columns are orthonormal within 1e-6 at
    real models' sizes, and within 2e-5 in the tails at d_model = 8. Otherwise the frames are float64.
    """
    d_model, k = noise.shape[1:]
    x = noise if 4 * k <= d_model or 2 * k <= d_model > FLOAT64_UP_TO else noise.double()
    if centred:
        x = x - x.mean(1, keepdim=True)
    if 2 * k <= d_model:
        R, _ = torch.linalg.cholesky_ex(x.mT @ x, upper=True, check_errors=True)
        return torch.linalg.solve_triangular(R, x, upper=True, left=False)
    Q, R = torch.linalg.qr(x)
    return Q * R.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]


class Frames:
    """Pairs of Haar frames, and matrices projected on them, computed once for all heads that share the frames.

    Attributes:
        read, write: [draw, d_model, k], independent; under LayerNorm orthogonal to the all-ones direction.
    """

    def __init__(self, noise: Float[Tensor, "frame d_model k"], centred: bool) -> None:
        """Take standard Gaussian noise, two matrices for each draw."""
        frames = haar_frames(noise, centred)
        self.read, self.write = frames[::2], frames[1::2]
        self._known: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def _once(self, name: str, of: Tensor, find: Callable[[], Tensor]) -> Tensor:
        known = self._known.get((name, id(of)))
        if known is None:  # `of` is kept with it, so that no other tensor can have its id
            known = self._known[name, id(of)] = of, find()
        return known[1]

    def across(self, gram: Gram) -> Float[Tensor, "draw k k"]:
        """Return write^T G read."""
        return self._once("across", dense(gram), lambda: self._through(self.write, dense(gram), self.read))

    def read_gram(self, gram: Gram) -> Float[Tensor, "draw k k"]:
        """Return read^T G read."""
        return self._once("read", dense(gram), lambda: self._through(self.read, dense(gram), self.read))

    def write_gram(self, gram: Gram) -> Float[Tensor, "draw k k"]:
        """Return write^T G write."""
        return self._once("write", dense(gram), lambda: self._through(self.write, dense(gram), self.write))

    def queried(self, rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "draw row k"]:
        """Return rows @ read."""
        return self._once("queried", rows, lambda: rows @ self.read.to(rows))

    def answered(self, rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "draw row k"]:
        """Return rows @ write."""
        return self._once("answered", rows, lambda: rows @ self.write.to(rows))

    def forget_rows(self) -> None:
        """Drop products with rows, which are a task's; products with Grams stay."""
        for name, of in [known for known in self._known if known[0] in ("queried", "answered")]:
            del self._known[name, of]

    @property
    def size(self) -> int:
        """The number of bytes in the frames and in what is kept with them, Grams aside."""
        kept = [found for _, found in self._known.values()]
        return sum(tensor.nbytes for tensor in (self.read, self.write, *kept))

    @staticmethod
    def _through(
        left: Float[Tensor, "draw d_model k"], gram: Matrix, right: Float[Tensor, "draw d_model k"]
    ) -> Float[Tensor, "draw k k"]:
        return (left.mT.to(gram.dtype) @ (gram @ right.to(gram.dtype))).double()


class KeptFrames:
    """Batches of frames that cells of one model leave to each other, the first ones up to a number of bytes."""

    def __init__(self, most: int = KEPT_BYTES) -> None:
        """Start without frames."""
        self.most = most
        self._batches: dict[object, tuple[Frames, Tensor, int]] = {}

    @property
    def used(self) -> int:
        """The number of bytes kept."""
        return sum(size for *_, size in self._batches.values())

    def find(self, of: object) -> tuple[Frames, Tensor] | None:
        """Return a batch, and the generator's state after it; None if it is not kept."""
        known = self._batches.get(of)
        return None if known is None else known[:2]

    def keep(self, of: object, frames: Frames, state: Tensor) -> None:
        """Keep a batch if there is room, without products with rows."""
        frames.forget_rows()
        self._batches.pop(of, None)
        if self.used + frames.size <= self.most:
            self._batches[of] = frames, state, frames.size


@dataclass
class FrameBatch:
    """A batch of frames: kept ones, or noise that they are made from.

    Attributes:
        of: everything that the frames depend on: seed, sizes, and the place among the draws.
        state: the generator's state after them; None if nothing is kept.
        noise: None if the frames are there.
        frames: None until they are made.
        kept: keeps them; None to keep none.
    """

    of: object
    state: Tensor | None
    centred: bool
    noise: Float[Tensor, "frame d_model k"] | None
    frames: Frames | None
    kept: KeptFrames | None

    @classmethod
    def next(
        cls, generator: torch.Generator, shape: tuple[int, int, int], centred: bool, of: object, kept: KeptFrames | None
    ) -> "FrameBatch":
        """Return the generator's next batch; the generator moves on as if it had made kept ones, too."""
        known = None if kept is None else kept.find(of)
        if known is not None:
            generator.set_state(known[1])
            return cls(of, known[1], centred, None, known[0], kept)
        noise = gaussian(*shape, generator)
        return cls(of, None if kept is None else generator.get_state(), centred, noise, None, kept)

    def made(self, device: torch.device) -> Frames:
        """Return the frames, on this device."""
        if self.frames is None:
            assert self.noise is not None
            self.frames, self.noise = Frames(self.noise.to(device), self.centred), None
        return self.frames

    def leave(self) -> None:
        """Leave the frames to later cells, if this process keeps any and has room."""
        if self.kept is not None and self.frames is not None and self.state is not None:
            self.kept.keep(self.of, self.frames, self.state)
