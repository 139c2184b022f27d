"""Counter-based random numbers: any draw of any key can be made without the ones before (docs/model.md section 13).

Draw i of stream s of a key is splitmix64(key + (4 i + s + 1) * golden); orders without repetition are a Feistel
permutation with cycle walking. All is integer arithmetic: the same on every machine.
"""

import numpy as np

from kernels.jit import jit

GOLDEN = 0x9E3779B97F4A7C15
MASK64 = (1 << 64) - 1
# Typed, as all constants that are passed on: compiled code is made once per type of its arguments, and a literal is a type.
SALT_ACTOR, SALT_ORDER, SALT_WRITE, SALT_READ_FIRST = np.int64(0), np.int64(1), np.int64(2), np.int64(3)
SALT_THP = np.int64(3)
PERMUTE_KEY = 0x5851F42D4C957F2D  # keeps a permutation's draws apart from all others of the key
THP_KEY = 0x7468705F6661696C  # keeps the draws of failing allocations apart
DRAW_BITS = 53


def mix64(z: int) -> int:
    """splitmix64's finaliser over a 64-bit integer."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def step_key(seed: int, replicate: int, step: int) -> int:
    """Key of a workload's step: no configuration enters, so that replicates share their random numbers."""
    key = mix64((seed + GOLDEN) & MASK64)
    for part in (replicate, step):
        key = mix64((key + (part + 1) * GOLDEN) & MASK64)
    return key


def signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit integer."""
    return value - (1 << 64) if value >> 63 else value


def cut(probability: float) -> int:
    """A draw of DRAW_BITS bits is below this with that probability."""
    return int(probability * (1 << DRAW_BITS))


_GOLDEN = np.uint64(GOLDEN)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31 = np.uint64(30), np.uint64(27), np.uint64(31)
_S11, _S2, _S32 = np.uint64(11), np.uint64(2), np.uint64(32)


NEXT_DRAW = np.uint64(GOLDEN * 4 & MASK64)  # from draw_state() of one draw to that of the next


@jit
def draw_state(key: int, salt: int, i: int) -> np.uint64:
    """What scramble() makes draw number i of the key's stream `salt` of; the next draw's is NEXT_DRAW more."""
    return np.uint64(key) + _GOLDEN * np.uint64((i << 2) + salt + 1)


@jit
def scramble(z: np.uint64) -> np.uint64:
    """splitmix64's finaliser."""
    z = (z ^ (z >> _S30)) * _M1
    z = (z ^ (z >> _S27)) * _M2
    return z ^ (z >> _S31)


@jit
def step_key_of(seed: int, replicate: int, step: int) -> int:
    """step_key() of a seed that is given as signed(), for compiled code."""
    key = scramble(np.uint64(seed) + _GOLDEN)
    key = scramble(key + np.uint64(replicate + 1) * _GOLDEN)
    return np.int64(scramble(key + np.uint64(step + 1) * _GOLDEN))


@jit
def draw(key: int, salt: int, i: int) -> np.uint64:
    """64 random bits: number i of the key's stream `salt`."""
    return scramble(draw_state(key, salt, i))


@jit
def drawn_below(bits: np.uint64, limit: int) -> bool:
    """The draw says yes: its DRAW_BITS upper bits are below what cut() gave."""
    return np.int64(bits >> _S11) < limit


@jit
def below(bits: np.uint64, n: int) -> int:
    """A number in 0 ... n - 1 from the upper 32 bits (n < 2**32)."""
    return np.int64(((bits >> _S32) * np.uint64(n)) >> _S32)


@jit
def actor_key(key: int, actor: int) -> int:
    return np.int64(draw(key, SALT_ACTOR, actor))


@jit
def half_bits(n: int) -> int:
    """Half the bits of the next power of four: what permute_once() permutes."""
    half = 1
    while (1 << (2 * half)) < n:
        half += 1
    return half


@jit
def permute_once(key: int, x: int, half: int) -> int:
    """Place of x in a permutation of the power of four: four Feistel rounds."""
    mask = (1 << half) - 1
    left, right = x >> half, x & mask
    for turn in range(4):
        left, right = right, left ^ (np.int64(draw(key ^ PERMUTE_KEY, turn, right) >> _S32) & mask)
    return (left << half) | right


@jit
def permute(key: int, i: int, n: int) -> int:
    """Place of i in a permutation of 0 ... n - 1: that of the next power of four, cycle walking."""
    half = half_bits(n)
    x = i
    while True:  # ends: a permutation of the power of four leads back into 0 ... n - 1
        x = permute_once(key, x, half)
        if x < n:
            return x
