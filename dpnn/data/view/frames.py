"""The view of samples that are frames, any number of them: as many as the network wants, one of each equal stretch."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnn import philox
from dpnn.data.view.base import BadSample, Normalisation

Array = NDArray[Any]


class Frames:
    """Frame floor((i + u) stored / wanted) for i = 0, 1, ...; u is drawn for training, and 0.5 for evaluation."""

    def __init__(self, shape: tuple[int, ...], normalise: Normalisation, seed: int, training: bool) -> None:
        self.shape, self._normalise, self._seed, self._training = shape, normalise, seed, training
        self._wanted, _, self._numbers = shape

    def draw(self, ids: Array, epoch: int) -> Array:
        """u in units of 2**-32 for each frame, uint32 (N, T)."""
        if self._training:
            return philox.by_sample(self._seed, epoch, "frames", ids, self._wanted)
        return np.full((len(ids), self._wanted), 1 << 31, np.uint32)

    def put(self, source: Any, slots: Array, choices: Array, out: Array) -> None:
        """Gather frames and normalise."""
        places = (np.arange(self._wanted, dtype=np.uint64) << np.uint64(32)) + choices
        for i, slot in enumerate(slots.tolist()):
            record = np.frombuffer(source[slot], np.uint8)
            if not len(record) or len(record) % self._numbers:
                raise BadSample(i, f"its {len(record)} bytes are not frames of {self._numbers}")
            frames = record.reshape(-1, 1, self._numbers)
            at = places[i] * np.uint64(len(frames)) // np.uint64(self._wanted) >> np.uint64(32)
            self._normalise.gather(frames, at, out[i])
