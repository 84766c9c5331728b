"""Vectors of images by name in a .npz file: embeddings and probabilities that another call need not compute again."""

from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np

from runtime import files
from runtime.cli import UserError, first_line
from runtime.retry import read_bytes

SAVE_SECONDS = 30


class VectorCache:
    """Vectors by name in a .npz file, for one model.

    Args:
        path: the file, whose name holds a digest of the model.
        width: length of a vector.
    """

    def __init__(self, path: Path, width: int):
        self.path, self.vectors = path, {}
        if path.is_file():
            try:
                with np.load(io.BytesIO(read_bytes(path)), allow_pickle=False) as file:
                    self.vectors = dict(zip(file["names"].tolist(), file["vectors"], strict=True))
            except (OSError, ValueError, KeyError) as error:
                raise UserError(f"{path}: not readable ({first_line(error)}); delete it") from None
        self.vectors = {name: vector for name, vector in self.vectors.items() if vector.shape == (width,)}
        self.saved = time.monotonic()

    def missing(self, names: list[str]) -> list[str]:
        """The names that have no vector yet."""
        return [name for name in names if name not in self.vectors]

    def add(self, names: list[str], vectors: np.ndarray) -> None:
        """Keep float (n, width); the file is written every half minute and by `save`."""
        self.vectors |= dict(zip(names, vectors.astype(np.float32), strict=True))
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write the file, whole or not at all."""
        names, vectors = np.array(list(self.vectors)), np.stack(list(self.vectors.values()))
        files.write_arrays(self.path, names=names, vectors=vectors)
        self.saved = time.monotonic()

    def get(self, names: list[str]) -> np.ndarray:
        """The vectors of these names, float32 (n, width)."""
        return np.stack([self.vectors[name] for name in names])
