import numpy as np
import pytest
import torch

from tests.cuda import DEVICE, on_gpu  # isort: skip
from radix_backend.sampling import torch_native
from radix_backend.sampling.base import SamplingRows
from radix_backend.sampling.cuda import LOG_MIN_P, SEED_HIGH, SEED_LOW, SETTINGS, TEMPERATURE, TOP_K, TOP_P, CudaSampler
from radix_backend.sampling.noise import row_keys, seed_keys

pytestmark = on_gpu

VOCAB = 151_936 if DEVICE == "cuda" else 5000
SETTINGS_OF_ROWS = [  # temperature, top_k, top_p, min_p
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.6, 0, 1.0, 0.0),
    (5.0, 0, 1.0, 0.0),
    (0.8, 5, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.3, 0, 0.8, 0.0),
    (1.0, 0, 1.0, 0.2),
    (0.6, 20, 0.95, 0.0),
    (1.0, 50, 0.9, 0.05),
    (1.0, 10**6, 1.0, 0.0),
]


def sampled(logits, rows, slots, lengths):
    """What the kernels draw; row i is in slot ``slots[i]`` and samples the token at ``lengths[i]``."""
    device_rows, settings = max(slots) + 1, np.zeros((max(slots) + 1, SETTINGS), np.int32)
    with np.errstate(divide="ignore"):
        log_min_p = np.log(rows.min_p)
    for row, slot in enumerate(slots):
        if slot >= 0:
            settings[slot, TEMPERATURE] = rows.temperature[row : row + 1].view(np.int32)[0]
            settings[slot, TOP_K] = rows.top_k[row]
            settings[slot, TOP_P] = rows.top_p[row : row + 1].view(np.int32)[0]
            settings[slot, LOG_MIN_P] = log_min_p[row : row + 1].view(np.int32)[0]
            settings[slot, [SEED_LOW, SEED_HIGH]] = seed_keys(np.array([row * 10**12])).view(np.int32)
    where = torch.zeros(device_rows, dtype=torch.int32)
    for slot, length in zip(slots, lengths, strict=True):
        if slot >= 0:
            where[slot] = length
    token_ids = torch.full((device_rows, max(lengths) + 1), -1, dtype=torch.int32, device=DEVICE)
    out = torch.full((len(slots),), -1, dtype=torch.int32, device=DEVICE)
    CudaSampler(len(slots), logits.shape[1], torch.device(DEVICE))(
        logits,
        torch.tensor(slots, dtype=torch.int32, device=DEVICE),
        where.to(DEVICE),
        torch.from_numpy(settings).to(DEVICE),
        token_ids,
        out,
    )
    for slot, length, token in zip(slots, lengths, out.tolist(), strict=True):
        if slot >= 0:
            assert token_ids[slot, length] == token
    assert int((token_ids >= 0).sum()) == sum(slot >= 0 for slot in slots)
    return out.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(5))
def test_draws_equal_the_definition(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    count = len(SETTINGS_OF_ROWS)
    logits = (torch.randn(count, VOCAB, generator=generator) * (1 + seed)).to(dtype)
    if seed == 3:
        logits[:, ::2] = -torch.inf
    temperature, top_k, top_p, min_p = (np.array(column) for column in zip(*SETTINGS_OF_ROWS, strict=True))
    lengths = list(range(3, 3 + count))
    keys = row_keys(np.arange(count) * 10**12, np.array(lengths))
    rows = SamplingRows(
        temperature.astype(np.float32), top_k.astype(np.int32), top_p.astype(np.float32), min_p.astype(np.float32), keys
    )
    slots = [(7 * row) % 13 for row in range(count)]
    expected = torch_native.sample(logits, rows)[0].tolist()
    assert sampled(logits.to(DEVICE), rows, slots, lengths) == expected
    slots[2] = slots[5] = -1  # padding leaves no trace
    expected[2] = expected[5] = -1
    assert sampled(logits.to(DEVICE), rows, slots, lengths) == expected


def test_of_equal_logits_the_first_is_the_likeliest():
    logits = torch.zeros(1, VOCAB)
    logits[0, [VOCAB - 1, 4000, 4001]] = 1
    rows = SamplingRows(
        np.zeros(1, np.float32),
        np.zeros(1, np.int32),
        np.ones(1, np.float32),
        np.zeros(1, np.float32),
        row_keys(np.zeros(1, np.int64), np.zeros(1, np.int64)),
    )
    assert sampled(logits.to(DEVICE), rows, [0], [0]) == [4000]
