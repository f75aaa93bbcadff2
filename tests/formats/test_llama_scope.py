"""Llama Scope v1 and R1-distill, Llamascopium v2: dataset norms, decoder norms, two readings."""

import json

import pytest
import torch
from safetensors.torch import save_file

from fastsae import SAE

D, F, K = 6, 12, 3
NORMS = {"in": 17.0, "out": 9.0}
S_IN, S_OUT = D**0.5 / NORMS["in"], D**0.5 / NORMS["out"]
THETA = 0.5


def put(folder, tensors, cfg, weights, config="config.json"):
    (folder / weights).parent.mkdir(parents=True, exist_ok=True)
    tensors = {n: t.contiguous() for n, t in tensors.items()}
    if weights.endswith(".pt"):
        torch.save({"sae": tensors, "version": "2.0"}, folder / weights)
    else:
        save_file(tensors, folder / weights)
    (folder / config).write_text(json.dumps(cfg))
    return folder


def linear(w):
    keys = {"encoder.weight": w.W_enc, "encoder.bias": w.b_enc}
    return keys | {"decoder.weight": w.W_dec.T, "decoder.bias": w.b_dec}


def version_1(folder, w, **cfg):
    base = {"d_model": D, "d_sae": F, "jump_relu_threshold": THETA, "act_fn": "jumprelu"}
    base |= {"dataset_average_activation_norm": NORMS, "sparsity_include_decoder_norm": True}
    base |= {"hook_point_in": "blocks.15.hook_resid_post", "norm_activation": "dataset-wise"}
    base["hook_point_out"] = base["hook_point_in"]
    folder = folder / "Llama3_1-8B-Base-L15R-8x"
    weights = "checkpoints/final.safetensors"
    return put(folder, linear(w), base | cfg, weights, "hyperparams.json")


@pytest.mark.parametrize("include", [True, False])
def test_version_1_as_its_authors_read_it(tmp_path, draw, agrees, include):
    """Train: s_in·x in, s_out·x out. Fold so that x goes in and out; gate h·n > θ; keep h·n."""
    w = draw(f=F)
    sae = SAE.from_pretrained(version_1(tmp_path, w, sparsity_include_decoder_norm=include))
    W_dec = w.W_dec * S_IN / S_OUT
    n = W_dec.norm(dim=1) if include else torch.ones(F)
    h = (w.x @ w.W_enc.T + w.b_enc / S_IN) * n
    code = torch.where(h > THETA, h, 0)
    agrees(sae, w.x, code, (code / n) @ W_dec + w.b_dec / S_OUT)
    assert sae.config.hook_name == "blocks.15.hook_resid_post" and sae.config.d_out is None
    assert sae.config.model_name == "meta-llama/Llama-3.1-8B"


def test_version_1_as_saelens_reads_it(tmp_path, draw, agrees):
    w = draw(f=F)
    folder = version_1(tmp_path, w)
    sae = SAE.from_pretrained(folder, compat="saelens")
    h = S_IN * (w.x @ w.W_enc.T) + w.b_enc
    code = torch.where(h > THETA * S_IN, h, 0)
    agrees(sae, w.x, code, (code @ w.W_dec + w.b_dec) / S_IN)
    theirs = SAE.from_pretrained(folder).encode(w.x).to_dense() > 0
    assert (theirs != (code > 0)).any(), "the two readings gate differently: both are offered"


def test_version_1_transcoders_and_folded_files(tmp_path, draw, agrees):
    w = draw(f=F)
    folder = version_1(tmp_path, w, hook_point_out="blocks.15.hook_mlp_out")
    config = SAE.from_pretrained(folder).config
    assert (config.d_out, config.hook_name_out) == (D, "blocks.15.hook_mlp_out")
    folder = version_1(tmp_path, w, norm_activation="inference")
    n = w.W_dec.norm(dim=1)
    h = (w.x @ w.W_enc.T + w.b_enc) * n
    code = torch.where(h > THETA, h, 0)
    agrees(SAE.from_pretrained(folder), w.x, code, w.decode(code / n))


def test_r1_distill(tmp_path, draw, agrees):
    """A log threshold for each feature, activations h."""
    w = draw(f=F)
    cfg = {"d_model": D, "expansion_factor": 2, "hook_point_in": "blocks.15.hook_resid_post"}
    cfg["dataset_average_activation_norm"] = NORMS
    tensors = linear(w) | {"log_jumprelu_threshold": w.theta.log()}
    sae = SAE.from_pretrained(put(tmp_path, tensors, cfg, "sae_weights.safetensors"))
    W_dec = w.W_dec * S_IN / S_OUT
    h = w.x @ w.W_enc.T + w.b_enc / S_IN
    code = torch.where(h * W_dec.norm(dim=1) > w.theta, h, 0)
    agrees(sae, w.x, code, code @ W_dec + w.b_dec / S_OUT)
    theirs = SAE.from_pretrained(tmp_path, compat="saelens")
    h = S_IN * (w.x @ w.W_enc.T) + w.b_enc
    code = torch.where(h > w.theta, h, 0)
    agrees(theirs, w.x, code, (code @ w.W_dec + w.b_dec) / S_IN)


def version_2(folder, w, weights="sae_weights.safetensors", norms=False, **cfg):
    hook = "blocks.4.hook_resid_post"
    base = {"sae_type": "sae", "d_model": D, "expansion_factor": 2, "act_fn": "relu", "top_k": K}
    base |= {"norm_activation": "inference", "sparsity_include_decoder_norm": True}
    base |= {"use_decoder_bias": True, "hook_point_in": hook, "hook_point_out": hook}
    tensors = {"W_E": w.W_enc.T, "b_E": w.b_enc, "W_D": w.W_dec, "b_D": w.b_dec}
    if cfg.get("act_fn") == "jumprelu":
        tensors["activation_function.log_jumprelu_threshold"] = w.theta.log()
    if cfg.get("use_decoder_bias") is False:
        del tensors["b_D"]
    if norms:
        tensors[f"dataset_average_activation_norm.{hook}"] = torch.tensor(NORMS["in"])
        out = cfg.get("hook_point_out", hook)
        if out != hook:
            tensors[f"dataset_average_activation_norm.{out}"] = torch.tensor(NORMS["out"])
    return put(folder, tensors, base | cfg, weights)


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("weights", ["sae_weights.safetensors", "sae_weights.pt"])
def test_version_2(tmp_path, draw, topk, agrees, act_fn, include, weights):
    """Selection on h·n, activations h."""
    w = draw(f=F)
    options = {"act_fn": act_fn, "sparsity_include_decoder_norm": include}
    sae = SAE.from_pretrained(version_2(tmp_path, w, weights, **options))
    n = w.W_dec.norm(dim=1) if include else torch.ones(F)
    h = (w.x @ w.W_enc.T + w.b_enc) * n
    code = {"relu": h.relu(), "topk": topk(h, K)}.get(act_fn, torch.where(h > w.theta, h, 0)) / n
    agrees(sae, w.x, code, w.decode(code))
    z = sae.encode(w.x)
    assert (z.values.diff(dim=-1) <= 0).all(), "descending in what is returned, not in h·n"
    assert sae.config.activation_scale is (act_fn == "topk" and include)


def test_version_2_dataset_norms(tmp_path, draw, agrees, fails):
    w = draw(f=F)
    out = "blocks.4.hook_mlp_out"
    options = {"norm_activation": "dataset-wise", "hook_point_out": out}
    sae = SAE.from_pretrained(version_2(tmp_path, w, norms=True, **options))
    code = (w.x @ w.W_enc.T + w.b_enc / S_IN).relu()
    agrees(sae, w.x, code, code @ w.W_dec * S_IN / S_OUT + w.b_dec / S_OUT)
    assert (sae.config.d_out, sae.config.hook_name_out) == (D, out)
    fails(version_2(tmp_path, w, **options), "'dataset-wise' without", "norm_activation")


def test_version_2_without_a_decoder_bias(tmp_path, draw, agrees):
    w = draw(f=F)
    sae = SAE.from_pretrained(version_2(tmp_path, w, use_decoder_bias=False))
    code = (w.x @ w.W_enc.T + w.b_enc).relu()
    agrees(sae, w.x, code, code @ w.W_dec)


@pytest.mark.parametrize(
    "cfg,words",
    [
        ({"sae_type": "crosscoder"}, "sae_type 'crosscoder' cannot be represented"),
        ({"use_glu_encoder": True}, "a gated linear encoder"),
        ({"act_fn": "batchtopk"}, "act_fn = 'batchtopk' cannot"),
        ({"norm_activation": "token-wise"}, "norm_activation = 'token-wise' cannot"),
        ({"d_model": 7}, "the config says d_model = 7, the biases say 6"),
    ],
)
def test_what_version_2_cannot_be(tmp_path, draw, fails, cfg, words):
    fails(version_2(tmp_path, draw(f=F), **cfg), "sae_weights.safetensors", words)


def test_a_crosscoder_is_refused(tmp_path, draw, fails):
    w = draw(f=F)
    w.W_enc, w.W_dec = w.W_enc.expand(2, F, D).mT, w.W_dec.expand(2, F, D)
    tensors = {"W_E": w.W_enc, "b_E": w.b_enc.expand(2, F), "W_D": w.W_dec, "b_D": w.b_dec}
    put(tmp_path, tensors, {"sae_type": "crosscoder"}, "sae_weights.safetensors")
    fails(tmp_path, "crosscoder", "cannot be represented")


def test_what_version_1_cannot_be(tmp_path, draw, fails):
    w = draw(f=F)
    fails(version_1(tmp_path, w, norm_activation="token-wise"), "'token-wise' cannot")
    fails(version_1(tmp_path, w, dataset_average_activation_norm=None), "overrides=")
    fails(version_1(tmp_path, w, act_fn="topk"), "act_fn = 'topk' cannot be represented")
    fails(version_1(tmp_path, w, apply_decoder_bias_to_pre_encoder=True), "pre_encoder = True")
    fails(version_2(tmp_path / "2", w), "SAELens does not read llamascopium", compat="saelens")
