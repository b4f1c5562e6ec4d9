"""When kernels are compiled: before there is traffic."""

import multiprocessing

import pytest

from tests.cuda import DEVICE, on_gpu  # isort: skip
from tests.engine.sim import SimEngine
from tests.models.tiny import save_tiny
from tests.worker.cuda_worker import MODES, prompt, worker

pytestmark = [on_gpu, pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter compiles nothing")]


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_compiled_under_traffic(tmp_path, mode):
    directory = save_tiny(tmp_path, "qwen3-biased")
    # In a process of its own: what other tests have compiled must not count.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(compiled_under_traffic, (directory, mode)) == []


def compiled_under_traffic(directory, mode):
    """Names of the kernels that are compiled once the worker is ready."""
    from triton import knobs

    compiled = []
    with worker(directory, mode, dtype="bfloat16", max_bs=16, kv_cache_memory=2**24) as runner:
        knobs.runtime.jit_post_compile_hook = lambda **call: compiled.append(call["fn"].name)
        engine = SimEngine(300, 16, max_bs=16, budget=200, worker=runner)
        common = prompt(64, seed=1)
        samplings = [
            {"temperature": 0.0},
            {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.01},
            {"repetition_penalty": 1.2, "frequency_penalty": 0.1, "logit_bias": {1: 2.0}, "min_tokens": 2},
            {"logprobs": 3},
            {"logprobs": 0, "prompt_logprobs": 2},
        ]
        for at_once in (1, 2, 3, 5, 9, 16):
            for length in (1, 2, 3, 4, 5, 17, 64, 100):
                for number in range(at_once):
                    own = prompt(length, seed=length + number)
                    engine.add([*common, *own] if number % 2 else own, 5, seed=number, **samplings[number % 5])
                engine.run()
    return compiled
