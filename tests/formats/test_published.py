"""Families published as single files: OpenAI, Qwen Scope, Goodfire, DeepSeek-R1, mwhanna, the MI
paper."""

import pytest
import torch
from safetensors.torch import save_file

from fastsae import SAE

D, F, K = 6, 12, 3


def pickled(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {n: t.contiguous() if isinstance(t, torch.Tensor) else t for n, t in content.items()}
    torch.save(tensors, path)
    return path


def openai(w, activation, tied=False, **options):
    keys = {"pre_bias": w.b_dec, "encoder.weight": w.W_enc, "latent_bias": w.b_enc}
    keys["decoder.linear.weight" if tied else "decoder.weight"] = w.W_enc if tied else w.W_dec.T
    keys["stats_last_nonzero"] = torch.zeros(F, dtype=torch.long)
    keys |= {"latents_activation_frequency": torch.ones(F), "latents_mean_square": torch.ones(F)}
    return keys | {"activation": activation, "activation_state_dict": options}


@pytest.mark.parametrize("tied", [False, True])
def test_openai_relu(tmp_path, draw, agrees, tied):
    w = draw(f=F)
    path = tmp_path / "gpt2-small" / "mlp_post_act" / "autoencoders" / "8.pt"
    sae = SAE.from_pretrained(pickled(path, openai(w, "ReLU", tied)))
    w.W_dec = w.W_enc if tied else w.W_dec
    code = ((w.x - w.b_dec) @ w.W_enc.T + w.b_enc).relu()
    agrees(sae, w.x, code, w.decode(code))
    assert sae.config.hook_name == "blocks.8.mlp.hook_post" and sae.config.model_name == "gpt2"


@pytest.mark.parametrize(
    "location,site",
    [
        ("resid_delta_attn_v5_32k", "hook_attn_out"),
        ("resid_post_attn_v5_128k", "hook_resid_mid"),
        ("resid_delta_mlp_v4", "hook_mlp_out"),
        ("resid_post_mlp", "hook_resid_post"),
    ],
)
def test_openai_topk_normalises_every_row(tmp_path, draw, topk, agrees, location, site):
    w = draw(f=F)
    w.x = w.x * 4 + 1
    path = tmp_path / "gpt2-small" / location / "autoencoders" / "11.pt"
    sae = SAE.from_pretrained(pickled(path, openai(w, "TopK", k=K, postact_fn="ReLU")))
    mu = w.x.mean(-1, keepdim=True)
    sigma = (w.x - mu).std(-1, keepdim=True)
    code = topk(((w.x - mu) / (sigma + 1e-5) - w.b_dec) @ w.W_enc.T + w.b_enc, K)
    agrees(sae, w.x, code, w.decode(code) * sigma + mu)
    assert sae.config.hook_name == f"blocks.11.{site}"


def test_openai_refusals(tmp_path, draw, fails):
    w, path = draw(f=F), tmp_path / "7.pt"
    fails(pickled(path, openai(w, "Sigmoid")), "activation 'Sigmoid' cannot be represented")
    odd = openai(w, "TopK", k=K, postact_fn="Identity")
    fails(pickled(path, odd), "postact_fn 'Identity' cannot be represented")
    fails(pickled(path, openai(w, "TopK", postact_fn="ReLU")), "k: got None")


def test_qwen_scope(tmp_path, draw, topk, agrees, fails):
    w = draw(f=1024)
    keys = {"W_enc": w.W_enc, "W_dec": w.W_dec.T, "b_enc": w.b_enc, "b_dec": w.b_dec}
    repository = tmp_path / "SAE-Res-Qwen3-1.7B-Base-W1K-L0_50"
    pickled(repository / "layer7.sae.pt", keys)
    sae = SAE.from_pretrained(repository, "layer7.sae.pt")
    code = topk(w.x @ w.W_enc.T + w.b_enc, 50)
    agrees(sae, w.x, code, w.decode(code))
    c = sae.config
    assert (c.k, c.hook_name) == (50, "blocks.7.hook_resid_post")
    assert c.model_name == "Qwen/Qwen3-1.7B-Base"
    elsewhere = pickled(tmp_path / "layer7.sae.pt", keys)
    fails(elsewhere, "k is in the repository's name", "overrides")
    assert SAE.from_pretrained(elsewhere, overrides={"k": 9}).config.k == 9
    wrong = tmp_path / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_50" / "layer7.sae.pt"
    fails(pickled(wrong, keys), "says 32K features, the biases 1024")


@pytest.mark.parametrize(
    "name,prefix,layer,model",
    [
        ("Llama-3.1-8B-Instruct-SAE-l19.pth", "_linear", 19, "meta-llama/Llama-3.1-8B-Instruct"),
        ("Llama-3.3-70B-Instruct-SAE-l50.pt", "_linear", 50, "meta-llama/Llama-3.3-70B-Instruct"),
        ("DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", "", 19, None),
    ],
)
def test_goodfire_and_deepseek(tmp_path, draw, agrees, name, prefix, layer, model):
    w = draw(f=F)
    for field in ("W_enc", "W_dec", "b_enc", "b_dec"):
        setattr(w, field, getattr(w, field).bfloat16())
    keys = {f"encoder{prefix}.weight": w.W_enc, f"encoder{prefix}.bias": w.b_enc}
    keys |= {f"decoder{prefix}.weight": w.W_dec.T, f"decoder{prefix}.bias": w.b_dec}
    sae = SAE.from_pretrained(pickled(tmp_path / name, keys))
    code = (w.x @ w.W_enc.float().T + w.b_enc.float()).relu()
    agrees(sae, w.x, code, code @ w.W_dec.float() + w.b_dec.float())
    assert sae.config.hook_name == f"blocks.{layer}.hook_resid_post"
    assert model is None or sae.config.model_name == model


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("threshold", [False, True])
def test_mwhanna(tmp_path, draw, agrees, turned, skip, threshold):
    """One release has W_dec [d, F]: the shapes say which."""
    w = draw(f=F)
    keys = {"W_enc": w.W_enc, "W_dec": w.W_dec.T if turned else w.W_dec}
    keys |= {"b_enc": w.b_enc, "b_dec": w.b_dec}
    keys |= {"W_skip": w.skip} if skip else {}
    keys |= {"activation_function.threshold": w.theta} if threshold else {}
    save_file({n: t.contiguous() for n, t in keys.items()}, tmp_path / "layer_4.safetensors")
    (tmp_path / "config.yaml").write_text("model_name: Qwen/Qwen3-4B\nother: {a: 1}\n")
    wandb = f"d_model: {{desc: null, value: {D}}}\nd_feature: {{value: {F}}}\n"
    (tmp_path / "wanb-config.yaml").write_text(wandb)
    sae = SAE.from_pretrained(tmp_path, "layer_4.safetensors")
    h = w.x @ w.W_enc.T + w.b_enc
    code = torch.where(h > (w.theta if threshold else 0), h, 0).relu()
    agrees(sae, w.x, code, w.decode(code) + (w.x @ w.skip.T if skip else 0))
    c = sae.config
    assert (c.hook_name, c.hook_name_out) == ("blocks.4.mlp.hook_in", "blocks.4.hook_mlp_out")
    assert c.model_name == "Qwen/Qwen3-4B" and c.d_out == D


def test_mwhanna_configs(tmp_path, draw, fails):
    w = draw(f=F)
    keys = {"W_enc": w.W_enc, "W_dec": w.W_dec, "b_enc": w.b_enc, "b_dec": w.b_dec}
    save_file(keys, tmp_path / "layer_4.safetensors")
    assert SAE.from_pretrained(tmp_path).config.model_name is None  # the 14b release has no config
    hooks = "feature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n"
    (tmp_path / "config.yaml").write_text(hooks)
    assert SAE.from_pretrained(tmp_path).config.hook_name == "blocks.4.hook_resid_mid"
    (tmp_path / "config.yaml").write_text("d_feature: 13\n")
    fails(tmp_path, "the config says d_feature = 13, the biases say 12")
    (tmp_path / "config.yaml").write_text("a: [1\n")
    fails(tmp_path, "config.yaml: cannot read it as YAML")


@pytest.mark.parametrize("mask", [None, torch.ones(F), torch.zeros(F, dtype=torch.bool)])
@pytest.mark.parametrize("kind", ["TopK7", "topk", "SAE", "ae"])
def test_the_mi_paper(tmp_path, draw, topk, agrees, kind, mask):
    """Tied weights, rows of any norm; the file counts blocks from 1."""
    w = draw(f=F)
    w.W_dec = w.W_enc
    weight = {"W_enc": w.W_enc.T.contiguous(), "b_enc": w.b_enc, "b_dec": w.b_dec}
    weight |= {} if mask is None else {"mask": mask}
    config = {"d_inp": D, "d_hide": F, "topK": K}
    path = tmp_path / f"{kind}_l8_h65k_epoch5.pth"
    sae = SAE.from_pretrained(pickled(path, {"weight": weight, "config": config}))
    h = (w.x - w.b_dec) @ w.W_enc.T + w.b_enc
    code = topk(h, K) if "topk" in kind.lower() else h.relu()
    agrees(sae, w.x, code, w.decode(code))
    assert sae.config.hook_name == "blocks.7.hook_resid_post"
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr(), "loaded untied"


def test_the_mi_paper_refusals(tmp_path, draw, fails):
    w, path = draw(f=F), tmp_path / "TopK7_l8_h65k_epoch5.pth"
    weight = {"W_enc": w.W_enc.T.contiguous(), "b_enc": w.b_enc, "b_dec": w.b_dec}
    mixed = torch.arange(F) % 2
    content = {"weight": weight | {"mask": mixed}, "config": {"topK": K}}
    fails(pickled(path, content), "a mask that switches features off")
    content = {"weight": weight, "config": {"topK": K, "d_hide": 13}}
    fails(pickled(path, content), "the config says d_hide = 13, the biases say 12")
    content = {"weight": weight | {"W_mystery": w.W_enc}, "config": {"topK": K}}
    fails(pickled(path, content), "unknown ['W_mystery']")
