"""`fastsae demo`: a real model explained and steered, with the figures behind every claim."""

import contextlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fastsae.demo import effect, report
from fastsae.environment import cpu_name, version_of
from fastsae.errors import FastsaeError
from fastsae.explain import Vocabulary, explain, top_activations
from fastsae.formats import write_text
from fastsae.models import GEMMA, load_model
from fastsae.sae import SAE
from fastsae.steering import Policy, add, steer

HERE = Path(__file__).resolve().parent
SHIPPED_SAE = HERE / "sae"
FOLD, RANDOM_FOLD, PERPLEXITY_RATIO, TOPICS = 5.0, 1.5, 2.0, 8


def load_topics() -> dict[str, Any]:
    """The topics, prompts and settings of the demo, fixed in advance in topics.json."""
    return json.loads((HERE / "topics.json").read_text(encoding="utf-8"))


class Demo:
    """The steps of the demo in order; `result` is the content of demo.json."""

    def __init__(self, output: Path, *, sae: Path, model: str, seed: int, quiet: bool):
        self.output, self.sae_path, self.model_name, self.seed = output, sae, model, seed
        self.stream = sys.stderr if quiet else sys.stdout
        self.setup = load_topics()
        self.timings: dict[str, float] = {}
        self.result: dict[str, Any] = {"seed": seed, "timings_s": self.timings}

    def say(self, text: str = "") -> None:
        print(text, file=self.stream, flush=True)

    @contextlib.contextmanager
    def step(self, name: str):
        self.say(f"\n== {name}")
        start = time.perf_counter()
        yield
        self.timings[name] = round(time.perf_counter() - start, 2)
        self.say(f"   ({self.timings[name]:.1f} s)")

    def run(self) -> dict[str, Any]:
        start = time.perf_counter()
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FastsaeError(f"output: cannot create {self.output}: {error.strerror}") from error
        with self.step("load the model and the SAE"):
            self.load()
        with self.step("explain every feature"):
            self.explain()
        with self.step("find where features are active in text"):
            self.activations()
        with self.step("steer ten topics and measure the effect"):
            self.steer()
        self.result["command"] = f"fastsae demo --output {self.output} --seed {self.seed}"
        self.result["summary"] = self.summary(time.perf_counter() - start)
        self.write()
        return self.result

    def load(self) -> None:
        self.model, self.tokenizer = load_model(self.model_name)
        self.sae = SAE.from_pretrained(self.sae_path)
        if self.sae.stats is None:
            raise FastsaeError(f"sae: {self.sae_path} has no feature statistics (fastsae.json)")
        c = self.sae.config
        self.result["model"] = {"name": self.model_name, "class": type(self.model).__name__}
        self.result["sae"] = {
            "d_in": c.d_in, "d_sae": c.d_sae, "k": c.k, "hook_name": c.hook_name,
            "metadata": c.metadata,
        }  # fmt: skip
        self.result["machine"] = {
            "cpu": cpu_name(), "threads": torch.get_num_threads(),
            "fastsae": version_of("fastsae-engine"), "torch": torch.__version__,
        }  # fmt: skip
        self.say(f"   {self.model_name} ({type(self.model).__name__}); {self.sae}")

    def explain(self) -> None:
        selection = self.setup["selection"]
        vocab = Vocabulary.default(selection["vocabulary"])
        self.explanations = explain(
            self.sae, self.model, self.tokenizer, vocab,
            objective=selection["objective"], top=selection["top"],
        )  # fmt: skip
        self.explanations.save(self.output / "explanations.safetensors")
        self.say(f"   {self.explanations}")
        for topic in self.setup["topics"]:
            found = self.explanations.search(
                topic["search"], top=selection["features"], aggregate=selection["aggregate"],
                alive_only=True, max_frequency=selection["max_frequency"],
            )  # fmt: skip
            topic["features"] = [feature for feature, _ in found]

    def activations(self) -> None:
        from fastsae.data import texts

        corpus = list(texts([HERE / "corpus.jsonl.gz"]))
        chosen = [topic["features"][0] for topic in self.setup["topics"]]
        rows = top_activations(
            self.sae, self.model, self.tokenizer, corpus[:: max(1, len(corpus) // 300)], chosen, n=3
        )
        self.result["features"] = []
        for feature in chosen:
            entry = {
                "feature": feature,
                "words": self.explanations.words(feature)[:10],
                "texts": [
                    {"before": t.before, "token": t.token, "after": t.after, "value": t.value}
                    for t in rows[feature]
                ],
            }
            self.result["features"].append(entry)
            self.say(f"\n   feature {feature}: {', '.join(entry['words'])}")
            for t in entry["texts"]:
                line = f"{t['before'][-40:]}[{t['token']}]{t['after'][:30]}".replace("\n", " ")
                self.say(f"      {t['value']:7.1f}  {line}")
        self.result["histogram"] = histograms(self.sae.stats)

    def policy(self, features: list[int], scale: float = 1.0) -> Policy:
        strength = self.setup["strength"]
        return Policy([add(features, strength["value"] * scale, unit=strength["unit"])])

    def delta(self, features: list[int]) -> torch.Tensor:
        """What the policy adds to every steered position, [d_in] float32."""
        strength = self.setup["strength"]
        unit = getattr(self.sae.stats, strength["unit"])[features]
        return strength["value"] * (unit[:, None] * self.sae.W_dec[features].detach()).sum(0)

    def steer(self) -> None:
        setup, prompts = self.setup, self.setup["prompts"]
        lists = {
            t["name"]: effect.first_tokens(self.tokenizer, t["held_out"]) for t in setup["topics"]
        }

        def draw(policy: Policy | None, words: dict) -> effect.Sample:
            steering = steer(self.model, self.sae, policy) if policy is not None else None
            return effect.sample(
                self.model, self.tokenizer, prompts, words,
                new_tokens=setup["new_tokens"], seed=self.seed, steering=steering,
            )  # fmt: skip

        base = draw(None, lists)
        base_perplexity = effect.perplexity(self.model, base)
        generator = torch.Generator().manual_seed(self.seed)
        alive = (self.sae.stats.frequency > 0).nonzero()[:, 0]
        self.result["base_perplexity"] = base_perplexity
        self.result["topics"] = []
        for topic in setup["topics"]:
            name, words = topic["name"], {topic["name"]: lists[topic["name"]]}
            steered = draw(self.policy(topic["features"]), words)
            size = float(self.delta(topic["features"]).norm())
            folds = []
            for _ in range(setup["random_draws"]):
                picked = alive[torch.randperm(len(alive), generator=generator)]
                random = picked[: len(topic["features"])].tolist()
                scale = size / float(self.delta(random).norm())
                folds.append(draw(self.policy(random, scale), words).mass[name] / base.mass[name])
            entry = {
                **topic,
                "base_mass": base.mass[name],
                "steered_mass": steered.mass[name],
                "fold": steered.mass[name] / base.mass[name],
                "random_fold": statistics.fmean(folds),
                "random_folds": folds,
                "perplexity_ratio": effect.perplexity(self.model, steered) / base_perplexity,
                "delta_norm": size,
                "pair": pair(prompts, base, steered),
            }
            entry["passed"] = passes(entry)
            self.result["topics"].append(entry)
            self.show(entry)

    def show(self, t: dict) -> None:
        if len(self.result["topics"]) == 1:
            self.say(f"   {'topic':11}{'rise':>8}{'random':>8}{'perplexity':>12}   features")
        self.say(
            f"   {t['name']:11}{t['fold']:7.1f}x{t['random_fold']:7.2f}x"
            f"{t['perplexity_ratio']:11.2f}x   {t['features']}"
        )

    def summary(self, seconds: float) -> dict[str, Any]:
        topics = self.result["topics"]
        passed = sum(t["passed"] for t in topics)
        return {
            "topics_passed": passed,
            "topics_needed": TOPICS,
            "passed": passed >= TOPICS,
            "median_fold": statistics.median(t["fold"] for t in topics),
            "random_fold_mean": statistics.fmean(t["random_fold"] for t in topics),
            "random_fold_max": max(t["random_fold"] for t in topics),
            "perplexity_ratio_max": max(t["perplexity_ratio"] for t in topics),
            "criterion": (
                f"held-out words rise at least {FOLD:g}-fold, random features at the same norm "
                f"under {RANDOM_FOLD:g}-fold, perplexity at most {PERPLEXITY_RATIO:g}-fold"
            ),
            "seconds": seconds,
        }

    def write(self) -> None:
        write_text(self.output / "demo.json", json.dumps(self.result, indent=1) + "\n")
        report.write(self.result, self.output / "report.html")
        summary = self.result["summary"]
        for topic in self.result["topics"]:
            pair = topic["pair"]
            self.say(f"\n   {topic['name']}: {pair['prompt']}")
            for kind in ("base", "steered"):
                self.say(f"      {kind:8}{pair[kind]}".replace("\n", " "))
        self.say(
            f"\n{summary['topics_passed']} of {len(self.result['topics'])} topics pass: "
            f"{summary['criterion']}.\n"
            + "\n".join(f"   {seconds:6.1f} s  {name}" for name, seconds in self.timings.items())
            + f"\n   {summary['seconds']:6.1f} s  in all\n\n"
            f"Open {self.output / 'report.html'}; the figures are in {self.output / 'demo.json'}."
        )


def passes(topic: dict) -> bool:
    """The demo's criterion for one topic, in the units of its table."""
    return (
        topic["fold"] >= FOLD
        and topic["random_fold"] < RANDOM_FOLD
        and topic["perplexity_ratio"] <= PERPLEXITY_RATIO
    )


def pair(prompts: list[str], base: effect.Sample, steered: effect.Sample) -> dict[str, str]:
    """The first prompt's two continuations: not chosen after looking."""
    return {"prompt": prompts[0], "base": base.texts[0], "steered": steered.texts[0]}


def histograms(stats) -> dict[str, Any]:
    """Counts of features by log10 firing frequency and by mean activation, dead ones left out."""
    alive = stats.frequency > 0
    out = {}
    for name, values in (
        ("frequency", stats.frequency[alive].log10()),
        ("activation", stats.mean[alive]),
    ):
        counts, edges = torch.histogram(values.float(), bins=40)
        out[name] = {"counts": counts.int().tolist(), "edges": edges.tolist()}
    return out


def run(
    output: str | Path = "demo-report",
    *,
    sae: str | Path = SHIPPED_SAE,
    model: str = GEMMA,
    seed: int = 0,
    as_json: bool = False,
) -> dict[str, Any]:
    """Run the demo; writes report.html, demo.json and explanations.safetensors into `output`."""
    return Demo(Path(output), sae=Path(sae), model=model, seed=seed, quiet=as_json).run()
