"""``python -m radix_backend.bench.vllm_engine SETTINGS_JSON MODEL_DIR``: vLLM without its server, for comparisons.

Run by an interpreter that has vLLM. Reads one JSON `Load` a line from stdin, plays it to an ``LLMEngine`` as vLLM's own
``LLM.generate`` does, and writes one JSON `Outcome` a line to stdout.
"""

from __future__ import annotations

import os
import sys

import msgspec
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

from radix_backend.load import Load, Outcome, Player


def play(llm: LLM, load: Load) -> Outcome:
    player, engine = Player(load), llm.llm_engine
    while player.playing:
        for number, prompt, num_outputs in player.due():
            params = SamplingParams(
                temperature=load.temperature,
                max_tokens=num_outputs,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            engine.add_request(str(number), {"prompt_token_ids": prompt.tolist()}, params)
        outputs = engine.step()
        now = player.now()
        for output in outputs:
            number = int(output.request_id)
            if tokens := output.outputs[0].token_ids:
                player.take(number, tokens, now)
            if output.finished:
                player.end(number, output.num_cached_tokens, now)
    return Outcome(player.traces)


def main() -> None:
    settings = msgspec.json.decode(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM and its processes log to standard output
    llm = LLM(
        model=sys.argv[2],
        load_format="dummy" if settings.get("load_format") == "dummy" else "auto",
        dtype=settings.get("dtype", "bfloat16"),
        max_model_len=int(settings["context_len"]) if "context_len" in settings else None,
        skip_tokenizer_init=True,
        seed=0,
    )
    for line in sys.stdin:
        outcome = play(llm, msgspec.json.decode(line, type=Load))
        answers.write(msgspec.json.encode(outcome).decode() + "\n")
        answers.flush()
    llm.llm_engine.engine_core.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main()
