"""Tiny random transformers models, an SAE for them, and steering written out as a plain hook."""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastsae import SAE, SAEConfig
from fastsae.steering import Policy, ablate, add, calibrate, site

D, F = 32, 64
SIZES = {
    "vocab_size": 97,
    "hidden_size": D,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,  # residuals of a length that makes features fire
}
GROUPED = SIZES | {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}
FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "mistral": ("MistralConfig", "MistralForCausalLM", GROUPED),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", GROUPED),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", GROUPED),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", GROUPED | {"sliding_window": 4}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", SIZES),
    "falcon": ("FalconConfig", "FalconForCausalLM", SIZES),  # falcon, bloom and gptj return tuples
    "bloom": ("BloomConfig", "BloomForCausalLM", SIZES | {"n_layer": 2, "n_head": 4}),
    "mamba": ("MambaConfig", "MambaForCausalLM", SIZES | {"state_size": 4}),  # no positions at all
    "gptj": ("GPTJConfig", "GPTJForCausalLM", SIZES | {"rotary_dim": 4}),
}
PADDED = torch.tensor([[0, 0, 5, 6, 7, 8], [4, 5, 6, 7, 8, 9], [0, 9, 8, 7, 6, 3]])
MASK = (PADDED != 0).long()
NEW = 5  # tokens that generate adds


# --- policies and the rows they steer ------------------------------------------------------------


@pytest.fixture(scope="session")
def everywhere():
    return Policy([add([1, 2], 4.0), calibrate(3, 2.0)])


@pytest.fixture(scope="session")
def prompt():
    return Policy(add([4, 5], 4.0), phase="prompt", norm="preserve")


@pytest.fixture(scope="session")
def generated():
    return Policy([add([6, 7], 4.0), ablate(8)], phase="generated")


@pytest.fixture(scope="session")
def batch(everywhere, prompt, generated):
    """Three left-padded rows, a policy for each, and which of their tokens are what."""
    real = MASK.bool()
    return SimpleNamespace(
        ids=PADDED,
        mask=MASK,
        lengths=[4, 6, 5],
        policies=[everywhere, prompt, generated],
        real=real,
        steered=real & (MASK.cumsum(1) > 1),  # every real token but each row's first one
    )


# --- models and SAEs -----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def build():
    def build(family: str, seed: int = 0) -> nn.Module:
        transformers = pytest.importorskip("transformers")
        config, model, sizes = FAMILIES[family]
        torch.manual_seed(seed)
        model = getattr(transformers, model)(getattr(transformers, config)(**sizes)).eval()
        model.generation_config.eos_token_id = None  # a random model must not stop early
        return model

    return build


@pytest.fixture(scope="session")
def shared(build):
    """`build`, once per family: for tests that leave the model as it was."""
    return functools.cache(build)


@pytest.fixture(params=FAMILIES)
def model(request, shared, assert_clean):
    model = shared(request.param)
    yield model
    assert_clean(model)


@pytest.fixture
def llama(shared, assert_clean):
    model = shared("llama")
    yield model
    assert_clean(model)


@pytest.fixture(scope="session")
def trunk_and_layers():
    def trunk_and_layers(model):
        trunk = model.base_model
        return trunk, trunk.h if hasattr(trunk, "h") else trunk.layers

    return trunk_and_layers


@pytest.fixture(scope="session")
def assert_clean(trunk_and_layers):
    def assert_clean(model):
        trunk, layers = trunk_and_layers(model)
        assert type(layers) is nn.ModuleList and "_fastsae_host" not in trunk.__dict__
        assert "generate" not in model.__dict__
        for module in (trunk, *layers):
            assert not [h for h in module._forward_pre_hooks.values() if "fastsae" in h.__module__]
            assert not [h for h in module._forward_hooks.values() if "fastsae" in h.__module__]

    return assert_clean


@pytest.fixture(scope="session")
def make_sae():
    def make_sae(activation="relu", hook="blocks.0.hook_resid_post", width=D):
        torch.manual_seed(1)
        k = 6 if activation == "topk" else None
        sae = SAE(SAEConfig(width, F, activation, k, hook_name=hook))
        with torch.no_grad():
            sae.b_enc.copy_(torch.randn(F) * 0.3)
            sae.b_dec.copy_(torch.randn(width) * 0.3)
        return sae

    return make_sae


@pytest.fixture(scope="module")
def sae(make_sae):
    return make_sae()


# --- running a model -----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def logits():
    @torch.no_grad()
    def logits(model, ids=PADDED, mask=MASK, **more):
        return model(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits

    return logits


@pytest.fixture(scope="session")
def generate():
    def generate(model, ids=PADDED, mask=MASK, **more):
        """(tokens [B, NEW], their logits [B, NEW, V])"""
        options = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True} | more
        if mask is not None:
            options["attention_mask"] = mask
        out = model.generate(ids, return_dict_in_generate=True, **options)
        return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)

    return generate


@pytest.fixture(scope="session")
def by_hand(trunk_and_layers):
    def by_hand(model, sae, layer, chosen, *policies):
        """A context in which a plain hook edits the tokens `chosen` [B, T], each in float64."""

        def edit(module, args, output):
            residual = (output[0] if isinstance(output, tuple) else output).clone()
            for row, token in chosen.nonzero().tolist():
                policy = policies[row if len(policies) > 1 else 0]
                if policy is not None:
                    residual[row, token] = definition(sae, policy, residual[row, token].double())
            return (residual, *output[1:]) if isinstance(output, tuple) else residual

        return trunk_and_layers(model)[1][layer].register_forward_hook(edit)

    return by_hand


def definition(sae, policy, x, strength=1.0):
    """One token, one feature at a time."""
    with torch.no_grad():
        W, dec, b, b_dec = (p.double() for p in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec))
        r = x.clone()
        if policy.gate is not None:
            means = [(W[f] @ (x - b_dec) + b[f]).relu() for f in policy.gate.features]
            if sum(means) / len(means) < policy.gate.above:
                return r
        for o in policy.operations:
            h = W @ (r - b_dec) + b
            acts = h.relu()
            if getattr(o, "active", "relu") == "sae" and sae.config.has_threshold:
                acts = torch.where(h > sae.threshold.double(), acts, 0)
            elif getattr(o, "active", "relu") == "sae" and sae.config.activation == "topk":
                acts = torch.where(h >= h.topk(sae.config.k).values[-1], acts, 0)
            value = getattr(o, o.per_feature or "", (-1.0,) * len(o.features))
            if getattr(o, "unit", "raw") != "raw":
                scale = getattr(sae.stats, o.unit)[list(o.features)].double().tolist()
                value = [c * own for c, own in zip(value, scale, strict=True)]
            if o.op == "enforce":
                v = torch.stack([(o.magnitude - acts[f]).relu() for f in o.features])
                moved = r + strength * o.magnitude * (v / v.sum()) @ dec[list(o.features)]
                r = moved * r.norm() / moved.norm() if v.sum() > 0 else r
                continue
            change = torch.zeros_like(r)
            for f, c in zip(o.features, value, strict=True):
                a = acts[f]
                if getattr(o, "mode", "set") == "floor" and a >= c:
                    continue
                change += dec[f] * {"add": c, "calibrate": c - a}.get(o.op, c * a)
            r = r + strength * change
        return r * x.norm() / r.norm() if policy.norm == "preserve" else r


@pytest.fixture(scope="session")
def oracle():
    return definition


@pytest.fixture
def count_steered(monkeypatch):
    """Starts to count, per batch row, the tokens that come out of a site changed, calls in turn."""

    def start():
        counter, real = SimpleNamespace(rows=0), site.Site.apply

        def counting(self, residual, where):
            before = residual.clone()
            after = real(self, residual, where)
            counter.rows = counter.rows + (after != before).any(-1).sum(1)
            return after

        monkeypatch.setattr(site.Site, "apply", counting)
        return counter

    return start
