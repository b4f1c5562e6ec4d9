"""What a sampler gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from radix_backend.sampling.noise import U64


@dataclass(frozen=True)
class SamplingRows:
    """How each row of logits is sampled; all arrays are [rows]."""

    temperature: npt.NDArray[np.float32]  # 0: the likeliest token, the first of several
    top_k: npt.NDArray[np.int32]  # 0: no limit
    top_p: npt.NDArray[np.float32]  # 1: no limit
    min_p: npt.NDArray[np.float32]  # 0: no limit
    keys: U64  # noise.row_keys

    @property
    def filters(self) -> npt.NDArray[np.bool_]:
        """[rows] whether which tokens survive depends on the whole vocabulary."""
        return (self.temperature > 0) & ((self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0))

    def take(self, rows: npt.NDArray[np.int64]) -> SamplingRows:
        return SamplingRows(
            self.temperature[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows], self.keys[rows]
        )


class Sampler(Protocol):
    """Draws from softmax(logits / temperature) over the tokens that survive min_p, then top_k, then top_p.

    All three are thresholds on logit / temperature, so that tokens as likely as the last one kept are kept too:
    min_p keeps what is at least that fraction of the likeliest; top_k what is not below the k-th of those;
    top_p what is not below the last token of the smallest set of the likeliest survivors that has that mass.
    """

    def __call__(self, logits: Tensor, rows: SamplingRows, first: int = 0) -> tuple[Tensor, Tensor]:
        """``logits`` [rows, vocabulary] of f32 or bf16, where -inf excludes a token; of the tokens from ``first`` on.

        Returns token ids [rows] int64 and their scores [rows] f32: logits where the temperature is 0, elsewhere
        logit / temperature plus noise. The winner among ranks is the token of the highest.
        """
