"""Families that SAELens converts: its own loaders on the same files, and where they are wrong."""

import pytest
import torch
from sae_lens import SAE as Theirs
from sae_lens.loading import pretrained_sae_loaders as loaders
from safetensors.torch import load_file

from fastsae import SAE, FastsaeError

D, F, K = 16, 64, 8
ROWS = ("encoder", "decoder")


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """loader, repository, folder -> SAELens' SAE from files under tmp_path/repository."""

    def local(repo_id, filename, subfolder=None, **_):
        path = tmp_path / repo_id / (subfolder or "") / filename
        if not path.exists():
            raise loaders.EntryNotFoundError(str(path))
        return str(path)

    def shapes(repo_id, filename):
        return {n: list(t.shape) for n, t in load_file(tmp_path / repo_id / filename).items()}

    monkeypatch.setattr(loaders, "hf_hub_download", local)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)

    def theirs(loader, repository, folder, **overrides):
        overrides = {"dtype": "float32"} | overrides
        cfg, state, _ = loader(
            repo_id=repository, folder_name=folder, device="cpu", cfg_overrides=overrides
        )
        cfg = loaders.handle_config_defaulting(cfg)
        sae_cfg = Theirs.get_sae_config_class_for_architecture(cfg["architecture"]).from_dict(cfg)
        sae = Theirs.get_sae_class_for_architecture(sae_cfg.architecture())(sae_cfg)
        sae.process_state_dict_for_loading(state)
        sae.load_state_dict(state, assign=True)
        return sae

    return theirs


def plain(w):
    return {"W_enc": w.W_enc.T, "W_dec": w.W_dec, "b_enc": w.b_enc, "b_dec": w.b_dec}


def linear(w, suffix=""):
    keys = {f"encoder{suffix}.weight": w.W_enc, f"encoder{suffix}.bias": w.b_enc}
    return keys | {f"decoder{suffix}.weight": w.W_dec.T, f"decoder{suffix}.bias": w.b_dec}


@pytest.mark.parametrize("place", ["layer_20", "embedding"])
def test_gemma_scope_1(tmp_path, draw, put, theirs, agrees, place):
    w, repository = draw(D, F), "google/gemma-scope-2b-pt-res"
    folder = f"{place}/width_16k/average_l0_71"
    put(tmp_path / repository / folder / "params.npz", plain(w) | {"threshold": w.theta})
    peer = theirs(loaders.gemma_2_sae_huggingface_loader, repository, folder, d_in=D, d_sae=F)
    ours = SAE.from_pretrained(tmp_path / repository, folder)
    agrees(ours, w.x, peer.encode(w.x), peer(w.x))
    assert ours.config.hook_name == peer.cfg.metadata.hook_name


def test_gemma_scope_1_transcoders(tmp_path, draw, put, theirs, agrees):
    w, repository = draw(D, F), "google/gemma-scope-2b-pt-transcoders"
    folder = "layer_3/width_16k/average_l0_8"
    put(tmp_path / repository / folder / "params.npz", plain(w) | {"threshold": w.theta})
    loader = loaders.gemma_2_transcoder_huggingface_loader
    peer = theirs(loader, repository, folder, d_in=D, d_out=D, d_sae=F)
    ours = SAE.from_pretrained(tmp_path / repository, folder)
    agrees(ours, w.x, peer.encode(w.x), peer(w.x))
    metadata = peer.cfg.metadata
    assert ours.config.hook_name == metadata.hook_name
    assert ours.config.hook_name_out == metadata.hook_name_out


@pytest.mark.parametrize("site", ["resid_post", "attn_out", "mlp_out", "transcoder_affine"])
def test_gemma_scope_2(tmp_path, draw, put, theirs, agrees, site):
    w, repository = draw(D, F), "google/gemma-scope-2-270m-pt"
    folder = f"{site}/layer_3_width_16k_l0_small"
    keys = {n.lower(): t for n, t in plain(w).items()} | {"threshold": w.theta}
    keys |= {"affine_skip_connection": w.skip.T} if "affine" in site else {}
    put(tmp_path / repository / folder / "params.safetensors", keys)
    peer = theirs(loaders.gemma_3_sae_huggingface_loader, repository, folder)
    ours = SAE.from_pretrained(tmp_path / repository, folder)
    agrees(ours, w.x, peer.encode(w.x), peer(w.x))
    assert ours.config.hook_name == peer.cfg.metadata.hf_hook_name


def test_a_clt_is_summed_by_saelens_and_refused_here(tmp_path, draw, put, theirs):
    """SAELens adds the output layers' decoders up: no layer's reconstruction is that sum."""
    w, repository = draw(D, F), "google/gemma-scope-2-270m-pt"
    keys = {n.lower(): t for n, t in plain(w).items()} | {"threshold": w.theta}
    keys["w_dec"] = torch.stack([w.W_dec, -w.W_dec, w.W_dec * 2], 1)
    path = put(tmp_path / repository / "clt/layer_3_width_1k.safetensors", keys)
    loader = loaders.gemma_3_sae_huggingface_loader
    peer = theirs(loader, repository, "clt/layer_3_width_1k")
    torch.testing.assert_close(peer.W_dec.detach(), w.W_dec * 2)
    with pytest.raises(FastsaeError, match="cross-layer transcoder"):
        SAE.from_pretrained(path)


@pytest.mark.parametrize("suffix", ["_linear", ""])
def test_goodfire_and_deepseek(tmp_path, draw, put, theirs, agrees, suffix):
    w = draw(D, F)
    name, loader = "Llama-3.1-8B-Instruct-SAE-l19", loaders.get_goodfire_huggingface_loader
    if not suffix:
        name, loader = (
            "DeepSeek-R1-Distill-Llama-8B-SAE-l19",
            loaders.deepseek_r1_sae_huggingface_loader,
        )
    repository, file = f"Goodfire/{name}", f"{name}.pth"
    put(tmp_path / repository / file, linear(w, suffix))
    peer = theirs(loader, repository, file, d_in=D, d_sae=F)
    ours = SAE.from_pretrained(tmp_path / repository, file)
    agrees(ours, w.x, peer.encode(w.x), peer(w.x))
    assert ours.config.hook_name == peer.cfg.metadata.hook_name == "blocks.19.hook_resid_post"


def test_qwen_scope(tmp_path, draw, put, theirs, agrees):
    w, repository = draw(D, 1024), "Qwen/SAE-Res-Qwen3-1.7B-Base-W1K-L0_50"
    keys = plain(w) | {"W_enc": w.W_enc, "W_dec": w.W_dec.T}
    put(tmp_path / repository / "layer7.sae.pt", keys)
    loader = loaders.qwen_scope_sae_huggingface_loader
    peer = theirs(loader, repository, "layer7.sae.pt", d_in=D)
    ours = SAE.from_pretrained(tmp_path / repository, "layer7.sae.pt")
    agrees(ours, w.x, peer.encode(w.x), peer(w.x))
    assert ours.config.k == peer.cfg.k == 50


def test_mwhanna(tmp_path, draw, put, theirs, agrees):
    w, repository = draw(D, F), "mwhanna/qwen3-4b-transcoders"
    path = put(tmp_path / repository / "layer_4.safetensors", plain(w) | {"W_enc": w.W_enc})
    (path.parent / "config.yaml").write_text("model_name: Qwen/Qwen3-4B\n")
    sizes = f"d_model: {{value: {D}}}\nd_feature: {{value: {F}}}\nbatch_size: {{value: 1}}\n"
    (path.parent / "wanb-config.yaml").write_text(sizes)
    loader = loaders.mwhanna_transcoder_huggingface_loader
    peer = theirs(loader, repository, "layer_4.safetensors")
    ours = SAE.from_pretrained(path)
    agrees(ours, w.x, peer.encode(w.x), peer(w.x))
    metadata = peer.cfg.metadata
    assert ours.config.hook_name == metadata.hook_name
    assert ours.config.hook_name_out == metadata.hook_name_out


def test_llama_scope(tmp_path, draw, put, theirs, agrees):
    """compat="saelens" is SAELens' reading; the authors' gates differ, and that is the default."""
    w, repository = draw(D, F), "fnlp/Llama3_1-8B-Base-LXR-8x"
    folder, norm = "Llama3_1-8B-Base-L15R-8x", 17.0
    path = put(tmp_path / repository / folder / "checkpoints/final.safetensors", linear(w))
    cfg = {"d_model": D, "d_sae": F, "jump_relu_threshold": 0.5, "norm_activation": "dataset-wise"}
    cfg |= {"dataset_average_activation_norm": {"in": norm, "out": norm}}
    cfg |= {"hook_point_in": "blocks.15.hook_resid_post", "sparsity_include_decoder_norm": True}
    put(path.parent.parent / "unused.pt", {}, hyperparams=cfg)
    peer = theirs(loaders.llama_scope_sae_huggingface_loader, repository, folder)
    peer.fold_activation_norm_scaling_factor(D**0.5 / norm)  # as from_pretrained does
    ours = SAE.from_pretrained(tmp_path / repository, folder, compat="saelens")
    agrees(ours, w.x, peer.encode(w.x), peer(w.x))
    authors = SAE.from_pretrained(tmp_path / repository, folder)
    n = w.W_dec.norm(dim=1)
    h = (w.x @ w.W_enc.T + w.b_enc * norm / D**0.5) * n
    code = torch.where(h > 0.5, h, 0)
    agrees(authors, w.x, code, (code / n) @ w.W_dec + w.b_dec * norm / D**0.5)
    assert ((peer.encode(w.x) > 0) != (code > 0)).any()


def test_r1_distill(tmp_path, draw, put, theirs, agrees):
    w, repository = draw(D, F), "fnlp/Llama-Scope-R1-Distill"
    folder, norm = "400M/L15R", 17.0
    keys = linear(w) | {"log_jumprelu_threshold": w.theta.log()}
    cfg = {"d_model": D, "expansion_factor": F // D, "hook_point_in": "blocks.15.hook_resid_post"}
    cfg["dataset_average_activation_norm"] = {"in": norm, "out": norm}
    put(tmp_path / repository / folder / "sae_weights.safetensors", keys, config=cfg)
    peer = theirs(loaders.llama_scope_r1_distill_sae_huggingface_loader, repository, folder)
    peer.fold_activation_norm_scaling_factor(D**0.5 / norm)
    ours = SAE.from_pretrained(tmp_path / repository, folder, compat="saelens")
    agrees(ours, w.x, peer.encode(w.x), peer(w.x))


# --- loaders of SAELens that give wrong numbers ---------------------------------------------------


def sparsify(w, **cfg):
    keys = {"encoder.weight": w.W_enc, "encoder.bias": w.b_enc, "W_dec": w.W_dec, "b_dec": w.b_dec}
    base = {"activation": "topk", "k": K, "expansion_factor": w.W_enc.shape[0] // D, "d_in": D}
    return keys, base | {"num_latents": 0, "normalize_decoder": True, "transcode": False} | cfg


def test_saelens_transposes_sparsifys_decoder(tmp_path, draw, put, theirs):
    """A size error, or silently the transpose when there are as many latents as dimensions; and
    num_latents 0 is taken as no latents, normalize_decoder as not subtracting b_dec."""
    w, loader = draw(D, F), loaders.sparsify_huggingface_loader
    keys, cfg = sparsify(w, num_latents=F)
    put(tmp_path / "a/b" / "layers.3" / "sae.safetensors", keys, cfg=cfg)
    with pytest.raises(RuntimeError, match=r"size mismatch for W_dec"):
        theirs(loader, "a/b", "layers.3")
    square = draw(D, D)
    keys, cfg = sparsify(square, num_latents=D)
    put(tmp_path / "a/b" / "layers.4" / "sae.safetensors", keys, cfg=cfg)
    peer = theirs(loader, "a/b", "layers.4")
    assert torch.equal(peer.W_dec, square.W_dec.T) and not peer.cfg.apply_b_dec_to_input
    ours = SAE.from_pretrained(tmp_path / "a/b", "layers.4")
    assert torch.equal(ours.W_dec, square.W_dec) and ours.config.apply_b_dec_to_input
    keys, cfg = sparsify(w)
    put(tmp_path / "a/b" / "layers.5.mlp" / "sae.safetensors", keys, cfg=cfg)
    with pytest.raises(RuntimeError, match="size mismatch"):
        theirs(loader, "a/b", "layers.5.mlp")
    ours = SAE.from_pretrained(tmp_path / "a/b", "layers.5.mlp")
    assert (ours.config.d_sae, ours.config.hook_name) == (F, "layers.5.mlp")


def test_saelens_misses_a_decoder_bias(tmp_path, draw, put, theirs, agrees):
    """dictionary_learning's AutoEncoderNew: `decoder.bias` is lost, and its input is centred."""
    w = draw(D, F)
    trainer = {"dict_class": "AutoEncoderNew", "activation_dim": D, "dict_size": F, "layer": 1}
    cfg = {"trainer": trainer | {"lm_name": "m", "k": K}, "buffer": {"ctx_len": 1}}
    put(tmp_path / "a/b" / "c" / "ae.pt", linear(w), config=cfg)
    loader = loaders.dictionary_learning_sae_huggingface_loader_1
    with pytest.raises((AttributeError, RuntimeError, TypeError)):
        theirs(loader, "a/b", "c")
    code = (w.x @ w.W_enc.T + w.b_enc).relu()
    agrees(SAE.from_pretrained(tmp_path / "a/b", "c"), w.x, code, code @ w.W_dec + w.b_dec)


def test_saelens_undoes_the_norm_of_another_input(tmp_path, draw):
    """Its layer norm is kept in the module: decode without encode fails, and after two encodes the
    first is undone with the second's. Ours is in the Latents."""
    w = draw(D, F)
    cfg = {"d_in": D, "d_sae": F, "architecture": "standard", "normalize_activations": "layer_norm"}
    peer = Theirs.from_dict(cfg | {"metadata": {}})
    peer.save_model(tmp_path)
    ours = SAE.from_pretrained(tmp_path)
    first, second = w.x[:50], w.x[50:100] * 7
    with torch.no_grad():
        right = peer(first)
        with pytest.raises(AttributeError):
            peer.decode(torch.zeros(3, F))
        code = peer.encode(first)
        peer.encode(second)
        assert not torch.allclose(peer.decode(code), right)
        z = ours.encode(first)
        ours.encode(second)
        torch.testing.assert_close(ours.decode(z), right, rtol=1e-4, atol=1e-4)
