"""The same prompt and random numbers, without and with a policy."""

import torch

from fastsae.errors import FastsaeError
from fastsae.steering.hf import steer
from fastsae.steering.policy import Policy


@torch.inference_mode()
def compare(
    model,
    tokenizer,
    sae,
    policy: Policy,
    prompt: str,
    *,
    max_new_tokens: int = 60,
    seed: int = 0,
    sample: bool = True,
    strength: float = 1.0,
    layer: int | str | None = None,
) -> tuple[str, str]:
    """(base, steered) continuations of `prompt`, without the prompt. Private random state."""
    if (
        isinstance(max_new_tokens, bool)
        or not isinstance(max_new_tokens, int)
        or max_new_tokens < 1
    ):
        raise FastsaeError(f"max_new_tokens: got {max_new_tokens!r}, expected a positive integer")
    batch = tokenizer(prompt, return_tensors="pt").to(next(model.parameters()).device)
    if batch.input_ids.shape[1] == 0:
        raise FastsaeError(f"prompt: {prompt!r} has no token in this tokenizer; give some text")
    options = (
        {"do_sample": True, "temperature": 1.0, "top_k": 0} if sample else {"do_sample": False}
    )

    def write() -> str:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            tokens = model.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                **options,
            )
        return tokenizer.decode(tokens[0, batch.input_ids.shape[1] :], skip_special_tokens=True)

    base = write()
    with steer(model, sae, policy, layer=layer, strength=strength):
        return base, write()
