"""The trainer: its loss against a dense formula, exact resume, and one line for every failure."""

import dataclasses
import errno
import json
import math
import os
import random
import signal

import pytest
import torch
from safetensors import SafetensorError

from fastsae.errors import FastsaeError
from fastsae.sae import SAE, SAEConfig
from fastsae.train import Interrupted, TrainConfig, train
from fastsae.training import checkpoint
from fastsae.training.config import Plan, default_lr
from fastsae.training.measure import feature_stats, reconstruction
from fastsae.training.trainer import Trainer, sae_loss

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS, D, F, K = 40, 16, 48, 4


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One thread, because the tensors are tiny; no fsync, because no test can see its effect."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i + 3 for i in range(WORDS)}
    level = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    level.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=level, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS + 3,
        hidden_size=D,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def corpus(tmp_path):
    rng = random.Random(0)
    text = [" ".join(f"w{rng.randrange(WORDS)}" for _ in range(20)) for _ in range(60)]
    (tmp_path / "corpus.txt").write_text("\n\n".join(text))
    return tmp_path / "corpus.txt"


@pytest.fixture
def config(corpus, tmp_path):
    """24 steps over about three epochs of 1100 tokens; dead features from the ninth step on."""
    return TrainConfig(
        layer=0,
        output=tmp_path / "sae",
        text=corpus,
        ctx_len=16,
        d_sae=F,
        k=K,
        batch_tokens=128,
        tokens=24 * 128,
        buffer_tokens=512,
        dead_after_tokens=150,
        lr=1e-3,
        checkpoint_every=7,
        log_every=1,
        eval_tokens=100,
    )


@pytest.fixture
def run(model, tokenizer):
    def call(config, **options):
        return train(config, model=model, tokenizer=tokenizer, progress=False, **options)

    return call


def stop_at(step, how):
    """An on_log that interrupts after `step` steps."""

    def on_log(record):
        if record["step"] == step:
            how()

    return on_log


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def equal(a: SAE, b: SAE) -> bool:
    tensors = ([*sae.state_dict().values(), *sae.stats[:3]] for sae in (a, b))
    return all(torch.equal(x, y) for x, y in zip(*tensors, strict=True))


def logged(config):
    lines = [json.loads(s) for s in open(f"{config.output}/train_log.jsonl")]
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in lines]


def one_line(error) -> bool:
    return "\n" not in str(error.value)


# --- the loss -----------------------------------------------------------------------------------


def dense_topk(h, k):
    """ReLU of the k largest entries of each row, dense; ties do not occur."""
    kept = torch.zeros_like(h).scatter(-1, h.topk(k, -1).indices, 1.0)
    return (h * kept).relu()


@pytest.mark.parametrize("kind", ["fvu", "mse"])
@pytest.mark.parametrize("dead", [0, 3, 20])
def test_loss_and_every_gradient_against_a_dense_formula(kind, dead):
    torch.manual_seed(1)
    make = lambda *shape: (torch.randn(*shape, dtype=torch.float64) / 4).requires_grad_()  # noqa: E731
    x = torch.randn(33, D, dtype=torch.float64) + 2
    parameters = W_enc, b_enc, W_dec, b_dec = make(F, D), make(F), make(F, D), make(D)
    rows = torch.randperm(F)[:dead].sort().values
    k_aux, coefficient = 7, 0.3

    latents = dense_topk((x - b_dec) @ W_enc.T + b_enc, K)
    x_hat = latents @ W_dec + b_dec
    variance = (x - x.mean(0)).square().sum()

    def normalised(difference):
        if kind == "fvu":
            return difference.square().sum() / variance
        return (difference.square().sum(1) / x.square().sum(1)).mean()

    wanted = normalised(x_hat - x)
    if dead:
        z = dense_topk((x - b_dec) @ W_enc[rows].T + b_enc[rows], min(k_aux, dead))
        aux = normalised(z @ W_dec[rows] - (x - x_hat).detach())
        wanted = wanted + coefficient * min(1, dead / k_aux) * aux
    gradients = torch.autograd.grad(wanted, parameters)
    loss = sae_loss(
        x, *parameters, K, kind=kind, dead=rows, k_aux=k_aux, aux_coefficient=coefficient
    )
    torch.testing.assert_close(loss.total, wanted)
    torch.testing.assert_close(loss.error / loss.variance, (x_hat - x).square().sum() / variance)
    for found, gradient in zip(torch.autograd.grad(loss.total, parameters), gradients, strict=True):
        torch.testing.assert_close(found, gradient)


def test_auxk_alone_reaches_the_encoder():
    torch.manual_seed(2)
    x, rows = torch.randn(20, D), torch.tensor([5, 9, 30])
    W_dec = torch.nn.functional.normalize(torch.randn(F, D), dim=-1).requires_grad_()
    W_enc, b_dec = W_dec.detach().clone().requires_grad_(), torch.zeros(D, requires_grad=True)
    # The dead features cannot win: the reconstruction term does not touch them.
    b_enc = torch.zeros(F).index_fill(0, rows, -1.0).requires_grad_()
    options = {"dead": rows, "k_aux": 3}
    for coefficient, reached in ((0.0, False), (1.0, True)):
        with torch.no_grad():
            b_enc[rows] = -1.0 if coefficient else -100.0
        loss = sae_loss(x, W_enc, b_enc, W_dec, b_dec, 2, aux_coefficient=coefficient, **options)
        for gradient in torch.autograd.grad(loss.total, (W_enc, b_enc, W_dec)):
            assert bool(gradient[rows].abs().sum() > 0) == reached


def plan(**options):
    defaults = {"d_in": D, "d_sae": F, "warmup_steps": 5, "decay_steps": 20, "steps": 100}
    return Plan(**{**defaults, "k_aux": 8, "dead_after_tokens": 400, "lr": 3e-3, **options})


def trainer_on(x, **options):
    made = Trainer(plan(), K, **options)
    made.start(x)
    return made


def test_auxk_revives_dead_features():
    torch.manual_seed(3)
    x = torch.randn(256, F, D).mul(torch.rand(256, F, 1) < 0.05).sum(1) * 30 + 100
    dead = {}
    for coefficient in (0.0, 1 / 4):
        trainer = trainer_on(x, aux_coefficient=coefficient)
        with torch.no_grad():
            trainer.weights["b_enc"][: F // 2] = -4.0
        for _ in range(80):
            trainer.step(x)
        dead[coefficient] = trainer.metrics()["dead"]
    assert dead[0.0] > 0.4 and dead[1 / 4] < dead[0.0] / 2


def test_decoder_rows_stay_unit_and_adam_sees_no_radial_gradient():
    torch.manual_seed(4)
    x = torch.randn(200, D)
    trainer = trainer_on(x)
    before = trainer.weights["W_dec"].detach().clone()
    trainer.step(x)
    rows = trainer.weights["W_dec"]
    moment = trainer.adam.state[rows]["exp_avg"]
    assert float(moment.abs().max()) > 0
    cosine = torch.nn.functional.cosine_similarity(moment, before, dim=-1)
    assert float(cosine.abs().max()) < 1e-5
    for _ in range(5):
        trainer.step(x)
    torch.testing.assert_close(rows.detach().norm(dim=-1), torch.ones(F))


def test_scale_is_a_power_of_two_and_folds_exactly():
    torch.manual_seed(5)
    x = torch.randn(300, D) * 700 + 5000
    trainer = trainer_on(x)
    norm = (x - x.mean(0)).norm(dim=-1).mean() * trainer.scale / D**0.5
    assert 0.7 < float(norm) < 1.42 and math.frexp(trainer.scale)[0] == 0.5
    for _ in range(10):
        trainer.step(x)
    w = {name: t.detach() for name, t in trainer.weights.items()}
    scaled = SAE(SAEConfig(d_in=D, d_sae=F, k=K))
    scaled.load_state_dict(w)
    exported = trainer.export(SAEConfig(d_in=D, d_sae=F, k=K))
    z, z_scaled = exported.encode(x), scaled.encode(x * trainer.scale)
    assert torch.equal(z.indices, z_scaled.indices)
    assert torch.equal(z.values * trainer.scale, z_scaled.values)
    assert torch.equal(exported(x) * trainer.scale, scaled(x * trainer.scale))


def test_scale_does_not_change_what_is_learned():
    torch.manual_seed(6)
    x = torch.randn(300, D) + 1
    made = []
    for factor in (1.0, 2.0**20):
        trainer = trainer_on(x * factor)
        for _ in range(10):
            trainer.step(x * factor)
        made.append(trainer.weights)
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_attention_sinks_are_left_out():
    torch.manual_seed(8)
    x = torch.randn(400, D) + 3
    sunk = torch.cat([x, torch.full((2, D), 900.0)])
    plain, robust = trainer_on(x), trainer_on(sunk, outlier_norm=5.0)
    assert torch.equal(robust.typical(sunk), x) and robust.scale == plain.scale
    torch.testing.assert_close(robust.weights["b_dec"], plain.weights["b_dec"])
    robust.load_state_dict(plain.state_dict() | {"limit": robust.limit, "centre": robust.centre})
    plain.step(x)
    robust.step(sunk)
    for name, weight in plain.weights.items():
        assert torch.equal(weight, robust.weights[name])
    assert trainer_on(sunk).limit == math.inf and torch.equal(trainer_on(sunk).typical(sunk), sunk)


def test_export_refuses_what_does_not_fit():
    x = torch.randn(100, D) * 100 + 1e6
    with pytest.raises(FastsaeError, match="b_dec does not fit in float16"):
        trainer_on(x).export(SAEConfig(d_in=D, d_sae=F, k=K, dtype="float16"))
    trainer_on(x).export(SAEConfig(d_in=D, d_sae=F, k=K, dtype="bfloat16"))


def test_equal_activations_and_divergence_are_one_line():
    with pytest.raises(FastsaeError, match="all activations are equal"):
        trainer_on(torch.ones(10, D))
    x = torch.randn(100, D)
    trainer = trainer_on(x)
    with torch.no_grad():
        trainer.weights["W_dec"][0, 0] = float("inf")
        trainer.weights["b_enc"][0] = 100.0
    trainer.step(x)
    with pytest.raises(FastsaeError, match=r"lr: the loss became (nan|inf) by step 1"):
        trainer.state_dict()
    with pytest.raises(FastsaeError, match=r"lr: the loss became (nan|inf) by step 1"):
        trainer.metrics()


def test_learning_rate_rises_stays_and_falls():
    p = plan()
    rates = [p.lr_at(s) / p.lr for s in range(100)]
    assert rates[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert set(rates[5:80]) == {1.0}
    assert rates[80:] == pytest.approx([i / 21 for i in range(20, 0, -1)])


# --- runs ---------------------------------------------------------------------------------------


def test_a_run_learns_saves_and_cleans_up(run, config, tmp_path):
    config = dataclasses.replace(config, tokens=200 * 128, lr=1e-2, checkpoint_every=50)
    seen = []
    sae = run(config, on_log=seen.append)
    assert set(os.listdir(config.output)) == {
        "cfg.json",
        "sae_weights.safetensors",
        "fastsae.json",
        "fastsae_stats.safetensors",
        "train.json",
        "train_log.jsonl",
    }
    assert [r["step"] for r in seen] == list(range(1, 201))
    assert set(seen[0]) == {"step", "tokens", "fvu", "l0", "dead", "lr", "tokens_per_s"}
    assert seen[-1]["fvu"] < 0.3 < seen[0]["fvu"] and seen[-1]["l0"] <= K
    loaded = SAE.from_pretrained(config.output)
    assert equal(sae, loaded)
    assert loaded.config.hook_name.startswith(("blocks.0", "layers.0"))
    metrics = json.loads(open(f"{config.output}/train.json").read())["metrics"]
    assert metrics["held_out"] and metrics["tokens"] >= 90 and metrics["fvu"] < 0.4
    assert metrics["training_tokens"] == 200 * 128


def test_the_same_seed_gives_the_same_weights(run, config, tmp_path):
    first = run(config)
    assert equal(first, run(dataclasses.replace(config, output=tmp_path / "again")))
    other = run(dataclasses.replace(config, output=tmp_path / "other", seed=1))
    assert not torch.equal(first.W_dec, other.W_dec)


@pytest.mark.parametrize("cache", [None, "auto"])
def test_interrupted_and_resumed_is_bit_identical(run, config, tmp_path, cache):
    config = dataclasses.replace(config, activation_cache=cache)
    whole = run(dataclasses.replace(config, output=tmp_path / "whole"))
    for step in (3, 12):
        with pytest.raises(Interrupted) as error:
            run(config, on_log=stop_at(step, interrupt))
        assert one_line(error) and f"at step {step} of 24" in str(error.value)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def crash():
        raise RuntimeError("the power went out")

    # Without a signal there is no farewell checkpoint: the one of step 14 (every 7) is used.
    with pytest.raises(RuntimeError):
        run(config, on_log=stop_at(19, crash))
    assert checkpoint.steps(tmp_path / "sae" / "checkpoints") == [12, 14]
    resumed = run(dataclasses.replace(config, resume="must", checkpoint_every=100))
    assert equal(whole, resumed)
    assert logged(config) == logged(dataclasses.replace(config, output=tmp_path / "whole"))


def test_interrupting_while_the_buffer_fills(run, config, tmp_path, model):
    whole = run(dataclasses.replace(config, output=tmp_path / "whole"))
    runs = []

    def count(*_):
        runs.append(1)
        if len(runs) == 2:
            interrupt()

    config = dataclasses.replace(config, model_batch_size=4)
    handle = model.register_forward_pre_hook(count)
    with pytest.raises(Interrupted, match="at step 0 of 24"):
        run(config)
    handle.remove()
    reference = run(dataclasses.replace(config, output=tmp_path / "four"))
    assert equal(run(config), reference) and whole.stats.tokens == reference.stats.tokens


def test_only_two_checkpoints_are_kept_and_damage_is_reported(run, config, tmp_path):
    with pytest.raises(Interrupted):
        run(dataclasses.replace(config, checkpoint_every=2), on_log=stop_at(9, interrupt))
    place = tmp_path / "sae" / "checkpoints"
    assert sorted(os.listdir(place)) == ["step-00000008", "step-00000009"]
    weights = place / "step-00000009" / "state.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(FastsaeError, match=r"step-00000009.*delete that directory") as error:
        run(config)
    assert one_line(error)


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ],
)
def test_full_disk_is_one_line_and_costs_one_interval(run, config, tmp_path, monkeypatch, failure):
    whole = run(dataclasses.replace(config, output=tmp_path / "whole"))
    real, place = checkpoint.save_file, tmp_path / "sae" / "checkpoints"

    def full(tensors, path):
        if "step-00000014" in str(path):
            path.write_bytes(b"half")
            raise failure
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(FastsaeError, match=r"disk is full.*step 7 is intact") as error:
        run(config)
    assert one_line(error) and os.listdir(place) == ["step-00000007"]
    monkeypatch.setattr(checkpoint, "save_file", real)
    assert equal(run(config), whole)


def test_resume_refuses_other_settings_by_name(run, config, corpus):
    with pytest.raises(Interrupted):
        run(config, on_log=stop_at(2, interrupt))
    for field, value in (("k", 5), ("lr", 2e-3), ("seed", 9), ("ctx_len", 8)):
        with pytest.raises(FastsaeError, match=f"resume: {field} is") as error:
            run(dataclasses.replace(config, **{field: value}))
        assert one_line(error)
    run(dataclasses.replace(config, dtype="bfloat16", checkpoint_every=3))
    with pytest.raises(FastsaeError, match="dtype is 'float32'"):
        run(config)


def test_changed_text_and_changed_model_are_noticed(run, config, corpus, model):
    with pytest.raises(Interrupted):
        run(config, on_log=stop_at(2, interrupt))
    text = corpus.read_text()
    corpus.write_text(text + "\n\nw1 w2 w3")
    with pytest.raises(FastsaeError, match="the text changed"):
        run(config)
    corpus.write_text(text)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2)
    with pytest.raises(FastsaeError, match="model_weights"):
        run(config)


def test_resume_modes_and_finished_runs(run, config):
    with pytest.raises(FastsaeError, match="no checkpoint"):
        run(dataclasses.replace(config, resume="must"))
    first = run(config)

    def never(_record):
        raise AssertionError("a finished run must not train")

    assert equal(run(config, on_log=never), first)
    with pytest.raises(FastsaeError, match="resume: k is 3"):
        run(dataclasses.replace(config, k=3))
    other = run(dataclasses.replace(config, k=3, resume="never"))
    assert other.config.k == 3


def test_training_on_its_own_samples(run, config, tmp_path):
    config = dataclasses.replace(config, text=(), samples=600, prompts=("w1", "w2 w3"))
    with pytest.raises(Interrupted):
        run(config, on_log=stop_at(5, interrupt))
    sae = run(config)
    again = dataclasses.replace(config, output=tmp_path / "again")
    assert equal(sae, run(again))
    assert (tmp_path / "sae" / "samples.jsonl.gz").read_bytes() == (
        tmp_path / "again" / "samples.jsonl.gz"
    ).read_bytes()


def test_a_named_cache_is_kept_and_used_again(run, config, tmp_path, model):
    path = tmp_path / "acts.bin"
    config = dataclasses.replace(config, activation_cache=str(path))
    run(config)
    assert path.exists()
    handle = model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    sae = run(dataclasses.replace(config, output=tmp_path / "other", k=2, lr=5e-4))
    handle.remove()
    assert sae.config.k == 2
    with pytest.raises(FastsaeError, match="cache_gb"):
        run(dataclasses.replace(config, output=tmp_path / "third", cache_gb=1e-9))


def test_user_mistakes_are_one_line(run, config, tmp_path, model, tokenizer):
    replace = dataclasses.replace
    (tmp_path / "empty.txt").write_text("\n \n")
    for changed, told in (
        ({"layer": 2}, r"layer: got 2, .* has layers 0 to 1"),
        ({"text": (str(tmp_path / "nothing.txt"),)}, "does not exist"),
        ({"text": (str(tmp_path / "empty.txt"),)}, "corpus is empty"),
        ({"d_sae": None, "expansion": 1, "k": 17}, "k: got 17, expected at most d_sae = 16"),
        ({"output": str(tmp_path / "empty.txt")}, "cannot write the run"),
    ):
        with pytest.raises(FastsaeError, match=told) as error:
            run(replace(config, **changed))
        assert one_line(error)
    with pytest.raises(FastsaeError, match="give both"):
        train(config, model=model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0] = float("inf")
    with pytest.raises(FastsaeError, match=r"layer 0: NaN or infinite.*model batch 1") as error:
        run(config)
    assert one_line(error)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer", "mlp.3"),
        ("k", 0),
        ("k", True),
        ("k", 99),
        ("epochs", 0),
        ("lr", -1.0),
        ("lr", float("nan")),
        ("loss", "l2"),
        ("dtype", "int8"),
        ("resume", "yes"),
        ("text", ()),
        ("samples", 10),
        ("buffer_tokens", 200),
        ("ctx_len", 1),
        ("top_p", 1.5),
        ("decay_fraction", 2),
        ("tokens", 0),
    ],
)
def test_config_names_the_bad_field(config, field, value):
    with pytest.raises(FastsaeError, match=field if field != "layer" else "hook") as error:
        dataclasses.replace(config, **{field: value})
    assert one_line(error)


def test_config_round_trip_and_defaults():
    config = TrainConfig(layer=3, output="x", text="a.txt")
    assert config.text == ("a.txt",)
    assert TrainConfig(**json.loads(json.dumps(config.to_dict()))) == config
    p = Plan.of(config, 1024, corpus_tokens=10**9)
    assert (p.d_sae, p.k_aux, p.dead_after_tokens) == (8192, 512, 10_000_000)
    assert p.lr == pytest.approx(2e-4 * 2**0.5) and p.warmup_steps == 1000
    assert p.steps == -(-(10**9) // 4096)
    short = Plan.of(config, 1024, corpus_tokens=4096 * 1250)
    assert short.lr == pytest.approx(4 * p.lr) and default_lr(2048, 10) == 3e-3


# --- statistics ---------------------------------------------------------------------------------


def test_statistics_and_reconstruction_against_dense(run):
    torch.manual_seed(7)
    sae = SAE(SAEConfig(d_in=D, d_sae=F, k=K))
    x = torch.randn(500, D)
    dense = sae.encode(x).to_dense().detach()
    stats = feature_stats(sae, x.split(77))
    active = dense > 0
    torch.testing.assert_close(stats.frequency, active.float().mean(0))
    torch.testing.assert_close(stats.mean, dense.sum(0) / active.sum(0).clamp(min=1))
    assert torch.equal(stats.max, dense.max(0).values) and stats.tokens == 500
    found = reconstruction(sae, x.split(77))
    error = (dense @ sae.W_dec + sae.b_dec - x).square().sum().detach()
    assert found["fvu"] == pytest.approx(float(error / (x - x.mean(0)).square().sum()), rel=1e-5)
    assert found["rms"] == pytest.approx(float((x - x.mean(0)).square().mean().sqrt()), rel=1e-5)
    assert found["l0"] == pytest.approx(float(active.sum(1).float().mean()))
    with pytest.raises(FastsaeError):
        feature_stats(sae, [])
