"""From logits to tokens, replayably."""
