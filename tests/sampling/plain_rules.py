"""The oracle of what requests change in the logits."""

from __future__ import annotations

import math


def apply_plainly(logits, params, stops, bad_words, prompt, outputs):
    """Straight from the definitions, one token at a time."""
    changed = [float(value) for value in logits]
    for token in range(len(logits)):
        changed[token] += max(-100.0, min(100.0, params.logit_bias.get(token, 0.0)))
        if token in stops and len(outputs) < params.min_tokens:
            changed[token] = -math.inf
        for word in bad_words:
            if word[-1] == token and (len(word) == 1 or outputs[-(len(word) - 1) :] == list(word[:-1])):
                changed[token] = -math.inf
        if token in prompt or token in outputs:
            penalty = params.repetition_penalty
            changed[token] = changed[token] / penalty if changed[token] > 0 else changed[token] * penalty
        changed[token] -= params.frequency_penalty * outputs.count(token)
        changed[token] -= params.presence_penalty * (token in outputs)
    return changed
