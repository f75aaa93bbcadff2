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
from fastsae.steering import Policy, add, attach

HERE = Path(__file__).resolve().parent
SHIPPED_SAE, TOPICS_FILE = HERE / "sae", HERE / "topics.json"
FOLD, RANDOM_FOLD, PERPLEXITY_RATIO, TOPICS = 5.0, 1.5, 2.0, 8
_NEEDED = {
    "": ("strength_sigma", "random_draws", "new_tokens", "prompts", "topics", "selection"),
    "selection": ("vocabulary", "objective", "top", "aggregate", "features", "min_frequency"),
}
_AT_ONCE = 5  # conditions generated in one batch


def load_topics(path: Path = TOPICS_FILE) -> dict[str, Any]:
    """Topics, prompts and settings: by default those of the demo, fixed in advance."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not found["topics"] or not found["prompts"]:
            raise FastsaeError(f"topics: {path} has no topics or no prompts")
        for part, names in _NEEDED.items():
            for name in names:
                (found[part] if part else found)[name]
        for topic in found["topics"]:
            if not topic["name"] or not topic["search"] or not topic["held_out"]:
                raise FastsaeError(f"topics: {path}: a topic without name, search or held_out")
            both = set(topic["search"]) & set(topic["held_out"])
            if both:
                raise FastsaeError(f"topics: {path}: {sorted(both)} are searched and held out")
    except FastsaeError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FastsaeError(
            f"topics: cannot read {path}: {type(error).__name__}: {error}; it needs the fields of "
            f"{TOPICS_FILE}"
        ) from error
    return found


class Demo:
    """The steps of the demo in order; `result` is the content of demo.json."""

    def __init__(
        self, output: Path, *, sae: Path, model: str, topics: Path, seed: int, quiet: bool
    ):
        self.output, self.sae_path, self.model_name, self.seed = output, sae, model, seed
        self.stream = sys.stderr if quiet else sys.stdout
        self.topics_path, self.setup = topics, load_topics(topics)
        self.topics: list[dict[str, Any]] = self.setup["topics"]
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
        self.result["command"] = self.command()
        self.result["summary"] = self.summary(time.perf_counter() - start)
        self.write()
        return self.result

    def command(self) -> str:
        """The command line that repeats this run."""
        given = {"output": self.output, "seed": self.seed}
        given |= {"sae": self.sae_path} if self.sae_path != SHIPPED_SAE else {}
        given |= {"topics": self.topics_path} if self.topics_path != TOPICS_FILE else {}
        return " ".join(["fastsae demo", *(f"--{name} {value}" for name, value in given.items())])

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
        for topic in self.topics:
            found = self.explanations.search(
                topic["search"], top=selection["features"], aggregate=selection["aggregate"],
                min_frequency=selection["min_frequency"],
            )  # fmt: skip
            topic["features"] = [feature for feature, _ in found]
            topic["scores"] = [score for _, score in found]

    def activations(self) -> None:
        from fastsae.data import texts

        corpus = list(texts([HERE / "corpus.jsonl.gz"]))
        chosen = [topic["features"][0] for topic in self.topics]
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

    def policy(self, name: str, features: list[int], weights: list[float]) -> Policy:
        """Add Σ w_f·mean_f·d_f over the features, rescaled to the norm strength_sigma·σ.

        mean_f is the feature's mean activation, d_f its decoder row and σ the centred per-dimension
        RMS of the residual stream, both measured by the training.
        """
        strengths = self.sae.stats.mean[features] * torch.tensor(weights)
        delta = (strengths[:, None] * self.sae.W_dec[features].detach()).sum(0)
        size = self.setup["strength_sigma"] * self.sae.config.metadata["metrics"]["rms"]
        return Policy([add(features, (strengths * size / delta.norm()).tolist())], name=name)

    def conditions(self) -> dict[str, Policy | None]:
        """No steering, a policy per topic, and random features.

        The random ones are drawn from the features as frequent as the steered ones which keep none
        of the search words of any topic among their words: a feature about the topic is no control.
        """
        found: dict[str, Policy | None] = {"base": None}
        found |= {
            t["name"]: self.policy(t["name"], t["features"], t["scores"]) for t in self.topics
        }
        selection = self.setup["selection"]
        free = self.sae.stats.frequency >= selection["min_frequency"]
        for t in self.topics:
            related = self.explanations.search(t["search"], top=self.sae.config.d_sae)
            free[[feature for feature, _ in related]] = False
        self.result["random_pool"] = int(free.sum())
        pool, generator = free.nonzero()[:, 0], torch.Generator().manual_seed(self.seed)
        for i in range(self.setup["random_draws"]):
            picked = pool[torch.randperm(len(pool), generator=generator)]
            features = picked[: selection["features"]].tolist()
            weights = [1.0] * len(features)
            found[f"random {i}"] = self.policy(f"random {i}", features, weights)
        return found

    def steer(self) -> None:
        """Write with every policy, then let every policy read the unsteered texts."""
        prompts = self.setup["prompts"]
        self.lists = [effect.first_tokens(self.tokenizer, t["held_out"]) for t in self.topics]
        noise = torch.rand(
            len(prompts),
            self.setup["new_tokens"],
            generator=torch.Generator().manual_seed(self.seed),
        )
        conditions = self.conditions()
        handle = attach(self.model, {self.sae.config.hook_name: self.sae})
        written: dict[str, effect.Sample] = {}
        names = [name for name in conditions if not name.startswith("random")]
        for start in range(0, len(names), _AT_ONCE):
            # Several policies share a batch, one per row: what a server does.
            group = names[start : start + _AT_ONCE]
            handle.set([conditions[name] for name in group for _ in prompts])
            together = effect.sample(
                self.model,
                self.tokenizer,
                prompts * len(group),
                self.lists,
                noise.repeat(len(group), 1),
            )
            for i, name in enumerate(group):
                written[name] = together.rows(slice(i * len(prompts), (i + 1) * len(prompts)))
            self.say(f"   wrote with {min(start + _AT_ONCE, len(names))} of {len(names)} policies")
        readings: dict[str, effect.Reading] = {}
        for name, policy in conditions.items():
            handle.set(policy)
            readings[name] = effect.read(self.model, written["base"], self.lists)
        handle.detach()
        self.judge(conditions, written, readings)

    def judge(self, conditions, written, readings) -> None:
        """The table: each policy's effect on its topic's held-out words, base and random beside it.

        `fold` compares steered and unsteered probability at the same positions of the same texts,
        those the unsteered model wrote; `writing_fold` in the texts that each of them writes.
        """
        random = [readings[name] for name in conditions if name.startswith("random")]
        base_perplexity = effect.perplexity(readings["base"])
        self.result["base_perplexity"] = base_perplexity
        self.result["topics"] = []
        folder = self.output / "policies"
        folder.mkdir(exist_ok=True)
        for j, topic in enumerate(self.topics):
            name, policy = topic["name"], conditions[topic["name"]]
            base, steered = float(readings["base"].mass[:, j].mean()), readings[name]
            folds = [float(r.mass[:, j].mean()) / base for r in random]
            own_base = float(written["base"].mass[:, j].mean())
            entry = {
                **topic,
                "policy": policy.to_dict(),
                "base_mass": base,
                "steered_mass": float(steered.mass[:, j].mean()),
                "fold": float(steered.mass[:, j].mean()) / base,
                "writing_fold": float(written[name].mass[:, j].mean()) / own_base,
                "random_fold": statistics.fmean(folds),
                "random_folds": folds,
                "perplexity_ratio": self.perplexity(written[name]) / base_perplexity,
                "pair": {
                    # The first prompt: not chosen after looking.
                    "prompt": self.setup["prompts"][0],
                    "base": written["base"].texts[0],
                    "steered": written[name].texts[0],
                },
            }
            entry["passed"] = passes(entry)
            self.result["topics"].append(entry)
            write_text(folder / f"{name}.json", json.dumps(policy.to_dict(), indent=1) + "\n")
            self.show(entry)

    def perplexity(self, text: effect.Sample) -> float:
        """Of a text under the unsteered model (nothing is attached any more)."""
        return effect.perplexity(effect.read(self.model, text, self.lists))

    def show(self, t: dict) -> None:
        if len(self.result["topics"]) == 1:
            self.say(
                f"   {'topic':11}{'rise':>8}{'random':>8}{'writing':>9}{'perplexity':>12}  features"
            )
        self.say(
            f"   {t['name']:11}{t['fold']:7.1f}x{t['random_fold']:7.2f}x{t['writing_fold']:8.1f}x"
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
    topics: str | Path = TOPICS_FILE,
    seed: int = 0,
    as_json: bool = False,
) -> dict[str, Any]:
    """Run the demo; writes report.html, demo.json and explanations.safetensors into `output`."""
    return Demo(
        Path(output), sae=Path(sae), model=model, topics=Path(topics), seed=seed, quiet=as_json
    ).run()
