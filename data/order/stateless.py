"""Random numbers without state: a pure function of (seed, purpose, global sample position, draw).

Every random decision of training (kept patches, crop windows, masks) is drawn here, so it does not depend on
the rank, the micro-batch or the number of readers, and a replayed forward sees the same numbers
(docs/layout_invariance.md). The position of a sample counts through the whole run (step x global batch +
row), so it carries the step.

The mixer is SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014),
applied to a counter: vectorised over samples and draws in numpy, no generator object per sample.
"""

import zlib

import numpy as np

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64 finaliser, uint64 -> uint64, wrapping."""
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


def _purpose_key(seed: int, purpose: str) -> np.ndarray:
    """uint64 [1]."""
    text = f"{seed}/{purpose}".encode()
    return np.array([(zlib.crc32(text) << 32) | zlib.crc32(text[::-1])], dtype=np.uint64)


def bits(seed: int, purpose: str, positions: np.ndarray, draws: int) -> np.ndarray:
    """uint64 [len(positions), draws], uniform over all 64 bits."""
    with np.errstate(over="ignore"):
        stream = _mix(np.asarray(positions, dtype=np.uint64) * _GOLDEN_GAMMA + _mix(_purpose_key(seed, purpose)))
        counter = np.arange(1, draws + 1, dtype=np.uint64) * _GOLDEN_GAMMA
        return _mix(stream[:, None] + counter[None, :])


def uniform(seed: int, purpose: str, positions: np.ndarray, draws: int) -> np.ndarray:
    """float64 [len(positions), draws] in [0, 1)."""
    return (bits(seed, purpose, positions, draws) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def kept_patches(seed: int, positions: np.ndarray, patches: int, keep: int, frames: int = 1) -> np.ndarray:
    """int64 [len(positions) * frames, keep]: the patches of each sample, or of each frame of each clip, that survive
    patch dropout, in grid order; the frames of a clip lie together.

    A uniformly random subset of size `keep` of the `patches` grid cells (PatchDropout of the authors' code
    draws the same distribution; its order of the survivors is random, ours is the grid's: attention does not
    see the order).
    """
    purposes = ["patch_dropout", *(f"patch_dropout/frame {frame}" for frame in range(1, frames))]
    scores = np.stack([bits(seed, purpose, positions, patches) for purpose in purposes], axis=1).reshape(-1, patches)
    chosen = np.argpartition(scores, keep - 1, axis=1)[:, :keep]
    return np.sort(chosen, axis=1).astype(np.int64)


def permutation(seed: int, purpose: str, count: int) -> np.ndarray:
    """int64 [count]: a permutation of range(count) that depends on (seed, purpose, count) alone."""
    key = int(bits(seed, purpose, np.zeros(1, dtype=np.uint64), 1)[0, 0])
    return np.random.Generator(np.random.Philox(key=key)).permutation(count)
