"""What can be wrong with a file, in every family: one clear line each, and never a wrong SAE."""

import json
import os
import pickle

import numpy
import pytest
import torch
from safetensors.torch import save_file

from fastsae import SAE, FastsaeError, formats

D, F, K = 6, 12, 3
LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")


def families(w):
    """name -> (file, config file, config, {key: tensor}); the first two keys are matrices."""
    plain = {"W_enc": w.W_enc.T, "W_dec": w.W_dec, "b_enc": w.b_enc, "b_dec": w.b_dec}
    rows = plain | {"W_enc": w.W_enc}
    theta = {"threshold": w.theta}
    lower = {n.lower(): t for n, t in plain.items()} | theta
    linear = dict(zip(LINEAR, (w.W_enc, w.b_enc, w.W_dec.T, w.b_dec), strict=True))
    linear = {n: linear[n] for n in (LINEAR[0], LINEAR[2], LINEAR[1], LINEAR[3])}
    sparse = {"encoder.weight": w.W_enc, "W_dec": w.W_dec, "encoder.bias": w.b_enc}
    openai = {"encoder.weight": w.W_enc, "decoder.weight": w.W_dec.T, "pre_bias": w.b_dec}
    lm = {"W_E": w.W_enc.T, "W_D": w.W_dec, "b_E": w.b_enc, "b_D": w.b_dec}
    saelens = {"architecture": "jumprelu", "d_in": D, "d_sae": F, "metadata": {}}
    dl = {"trainer": {"dict_class": "JumpReluAutoEncoder"}}
    scope = {"jump_relu_threshold": 0.5, "norm_activation": "inference"}
    return {
        "saelens": ("sae_weights.safetensors", "cfg.json", saelens, plain | theta),
        "sparsify": (
            "layers.1/sae.safetensors",
            "layers.1/cfg.json",
            {"k": K, "num_latents": F, "d_in": D},
            sparse | {"b_dec": w.b_dec},
        ),
        "dictionary_learning": ("ae.pt", "config.json", dl, plain | theta),
        "openai": ("8.pt", None, {}, openai | {"latent_bias": w.b_enc}),
        "gemma_scope": ("layer_1/params.npz", None, {}, plain | theta),
        "gemma_scope_2": ("params.safetensors", None, {}, lower),
        "llama_scope": ("checkpoints/final.safetensors", "hyperparams.json", scope, linear),
        "llamascopium": (
            "sae_weights.safetensors",
            "config.json",
            {"norm_activation": "inference"},
            lm,
        ),
        "qwen_scope": (
            "SAE-Res-M-W1K-L0_3/layer1.sae.pt",
            None,
            {},
            {**rows, "W_dec": w.W_dec.T},
        ),
        "linear": (
            "l19.pth",
            None,
            {},
            {n.replace(".", "_linear."): t for n, t in linear.items()},
        ),
        "mwhanna": ("layer_3.safetensors", None, {}, rows),
        "mi_paper": (
            "TopK7_l8_h1k_epoch5.pth",
            None,
            {"topK": K},
            {n: t for n, t in plain.items() if n != "W_dec"},
        ),
    }


@pytest.fixture
def write(tmp_path, draw):
    def write(family, change=lambda tensors: tensors):
        w = draw(f=1024 if family == "qwen_scope" else F)
        file, config, cfg, tensors = families(w)[family]
        tensors = {n: t.contiguous() for n, t in change(dict(tensors)).items()}
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if config:
            (tmp_path / config).write_text(json.dumps(cfg))
        if path.suffix == ".safetensors":
            save_file(tensors, path)
        elif path.suffix == ".npz":
            numpy.savez(path, **{n: t.numpy() for n, t in tensors.items()})
        else:
            torch.save(
                {"weight": tensors, "config": cfg} if family == "mi_paper" else tensors, path
            )
        return path

    return write


FAMILIES = tuple(formats.FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_is_found_by_content(write, family):
    path = write(family)
    sae = SAE.from_pretrained(path)
    assert formats.open_checkpoint(path)[1].NAME == family
    assert torch.equal(SAE.from_pretrained(path, format=family).W_dec, sae.W_dec)
    if path.name != "final.safetensors":
        assert torch.equal(SAE.from_pretrained(path.parent).W_dec, sae.W_dec)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", [0, 10, 0.5, -1])
def test_truncated(write, fails, family, keep):
    path = write(family)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    fails(path, path.name, "truncated or not a", format=family)


@pytest.mark.parametrize("family", FAMILIES)
def test_nan_weights(write, fails, family):
    def spoil(tensors):
        name = next(iter(tensors))
        tensors[name] = tensors[name].clone()
        tensors[name][1, 2] = torch.nan
        return tensors

    path = write(family, spoil)
    fails(path, path.name, "holds NaN or infinite values")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("which", [0, 1])
def test_a_wrong_width(write, fails, family, which):
    def widen(tensors):
        matrices = [n for n, t in tensors.items() if t.dim() == 2]
        name = matrices[min(which, len(matrices) - 1)]
        tensors[name] = torch.zeros([size + 1 for size in tensors[name].shape])
        return tensors

    path = write(family, widen)
    fails(path, path.name, "expected")


@pytest.mark.parametrize("family", FAMILIES)
def test_swapped_biases(write, fails, family):
    """The encoder's bias where the decoder's belongs, and every matrix fits when turned."""

    def swap(tensors):
        b = [n for n, t in tensors.items() if t.dim() == 1 and n != "threshold"]
        tensors[b[0]], tensors[b[1]] = tensors[b[1]], tensors[b[0]]
        return tensors

    path = write(family, swap)
    by_config = dict.fromkeys(("saelens", "sparsify"), "the config says d_in = 6")
    fails(path, path.name, (by_config | {"qwen_scope": "1K features"}).get(family, "expected"))


@pytest.mark.parametrize("family", ["saelens", "sparsify", "dictionary_learning"])
def test_swapped_orientation_in_a_librarys_own_format(write, fails, family):
    """Its library would not load it; the families without a library are read by their shapes."""

    def turn(tensors):
        name = next(iter(tensors))
        return tensors | {name: tensors[name].T}

    path = write(family, turn)
    fails(path, path.name, "has shape", "expected")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_key(write, fails, family):
    path = write(family, lambda tensors: tensors | {"mystery": torch.zeros(2)})
    fails(path, path.name, "unknown ['mystery']")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_key(write, fails, family):
    def drop(tensors):
        tensors.pop(list(tensors)[-1])
        return tensors

    path = write(family, drop)
    fails(path, path.name, "missing [", format=family)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_are_not_floats(write, fails, family):
    def integers(tensors):
        name = next(iter(tensors))
        return tensors | {name: torch.zeros(tensors[name].shape, dtype=torch.int8)}

    path = write(family, integers)
    fails(path, path.name, "dtype torch.int8", "expected floats")


class Bomb:
    def __reduce__(self):
        return os.system, ("echo boom > boom.txt",)


@pytest.mark.parametrize("name", ["ae.pt", "8.pth", "layer1.sae.pt"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, monkeypatch, fails, name):
    monkeypatch.chdir(tmp_path)
    torch.save({"encoder.weight": torch.zeros(2, 2), "bomb": Bomb()}, tmp_path / name)
    fails(tmp_path / name, name, "refused", "could run code")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"bomb": Bomb()}))
    with pytest.raises(FastsaeError):
        SAE.from_pretrained(tmp_path / "plain.pt")
    assert not (tmp_path / "boom.txt").exists()


def test_objects_in_an_npz_are_refused(tmp_path, fails):
    numpy.savez(tmp_path / "params.npz", W_enc=numpy.array([Bomb()], dtype=object))
    fails(tmp_path / "params.npz", "params.npz", "truncated or not an npz archive of numbers")


def test_a_pickle_of_something_else(tmp_path, fails):
    torch.save([torch.zeros(2)], tmp_path / "ae.pt")
    fails(tmp_path, "ae.pt", "expected a dictionary of tensors, found list")
    torch.save({"model": torch.zeros(2)}, tmp_path / "ae.pt")
    fails(tmp_path, "ae.pt", "keys ['model']", "no known family", "saelens")
