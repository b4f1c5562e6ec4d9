import numpy as np
import pytest

from radix_backend.sampling.noise import gumbel, hash32, row_keys

# Fixed for ever: a stream resumed by another version must go on with the same noise.
VECTORS = [
    # seed, position, token, hash32
    (0, 0, 0, 0x4B90CB40),
    (0, 0, 1, 0xB4621ECE),
    (0, 1, 0, 0x0B1F75BD),
    (1, 0, 0, 0x8DAE9527),
    (42, 17, 49151, 0xE1E8F693),
    (9223372036854775807, 8191, 151935, 0xE675C97B),
    (123456789012345678, 1000000, 7, 0xD3283598),
]


def hashes(seed, position, tokens):
    keys = row_keys(np.array([seed], np.int64), np.array([position], np.int64))
    return hash32(keys, np.asarray(tokens, np.int64))[0]


@pytest.mark.parametrize(("seed", "position", "token", "expected"), VECTORS)
def test_vectors(seed, position, token, expected):
    assert int(hashes(seed, position, [token])[0]) == expected


def test_noise_of_known_hashes():
    expected = np.float32([-np.log(-np.log1p(-((h + 0.5) / 2**32))) for h in (0, 2**31, 2**32 - 1)])
    values = gumbel(np.array([0, 2**31, 2**32 - 1], np.uint32))
    np.testing.assert_array_equal(values, expected)
    assert np.isfinite(values).all()
    assert values[0] == pytest.approx(22.87, abs=0.01)
    assert values[2] == pytest.approx(-3.13, abs=0.01)


@pytest.mark.parametrize("varied", ["seed", "position", "token"])
def test_every_input_bit_changes_half_of_the_hash(varied):
    base = {"seed": 123456789, "position": 77, "token": 4242}
    bits = {"seed": 63, "position": 20, "token": 17}[varied]
    flips = []
    for extra in range(200):
        start = {**base, "token": base["token"] + extra}
        for bit in range(bits):
            other = {**start, varied: start[varied] ^ (1 << bit)}
            pair = [int(hashes(x["seed"], x["position"], [x["token"]])[0]) for x in (start, other)]
            flips.append((pair[0] ^ pair[1]).bit_count())
    assert np.mean(flips) == pytest.approx(16, abs=0.25)


def test_hashes_are_uniform_and_uncorrelated_between_neighbours():
    seeds, positions = np.arange(64), np.arange(64)
    values = np.array([hashes(s, p, np.arange(256)) for s in seeds for p in positions]).reshape(64, 64, 256) / 2**32
    counts, _ = np.histogram(values, bins=64, range=(0, 1))
    expected = values.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 110  # chi-square, 63 degrees of freedom: p > 0.0002
    for axis in range(3):
        x, y = np.moveaxis(values, axis, 0)[:-1].ravel(), np.moveaxis(values, axis, 0)[1:].ravel()
        assert abs(np.corrcoef(x, y)[0, 1]) < 0.005
