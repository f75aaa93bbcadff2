"""`train`: from a model and text (or its own samples) to a saved SAE, restartable at any moment."""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastsae.data import ActivationStream, text_files, texts
from fastsae.errors import FastsaeError
from fastsae.models import hidden_size, hook_module, load_model, resolve_hook
from fastsae.sae import SAE, SAEConfig
from fastsae.training.cache import ActivationCache
from fastsae.training.checkpoint import check_settings, load_checkpoint, save_checkpoint, steps
from fastsae.training.config import Plan, TrainConfig
from fastsae.training.files import disk_errors, write_json
from fastsae.training.fingerprint import model_fingerprint, tokenizer_fingerprint
from fastsae.training.interrupt import Interrupted, Signals, StopRequested
from fastsae.training.measure import feature_stats, reconstruction
from fastsae.training.progress import Log, Progress
from fastsae.training.sampling import write_samples
from fastsae.training.tokens import TokenStore, special_ids, tokenize
from fastsae.training.trainer import Trainer

__all__ = ["Interrupted", "TrainConfig", "train"]

_START_ROWS = 16_384  # activations from which the scale and the first b_dec are measured


class _Run:
    """One call of `train`: the parts, in the order in which they are used."""

    def __init__(self, config: TrainConfig, model: nn.Module, tokenizer, progress: bool, on_log):
        hook_module(model, config.layer)  # a missing layer must fail before anything is written
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.progress, self.on_log = progress, on_log
        self.output = Path(config.output)
        self.checkpoints, self.work = self.output / "checkpoints", self.output / "work"
        self.model_weights = model_fingerprint(model)
        self.settings = config.to_dict() | {"model_weights": self.model_weights}
        with disk_errors("the run", self.output):
            self.work.mkdir(parents=True, exist_ok=True)

    def train(self) -> SAE:
        state = self._last_checkpoint()
        store = self._corpus()
        self._same_corpus(state, store)
        training, held_out = self._split(store)
        with Signals() as signals:
            stream = self._stream(store, training, signals)
            plan = Plan.of(self.config, hidden_size(self.model), stream.corpus_tokens)
            trainer = Trainer(
                plan,
                self.config.k,
                loss=self.config.loss,
                aux_coefficient=self.config.aux_coefficient,
                outlier_norm=self.config.outlier_norm,
                seed=self.config.seed,
                device=stream.device,
            )
            stream.cache = self._cache(stream, plan, state)
            if state:
                trainer.load_state_dict(state["trainer"])
                stream.load_state_dict(state["stream"])
            try:
                self._loop(trainer, stream, signals)
                sae, metrics = self._finish(trainer, stream, held_out, signals)
            except StopRequested:
                raise self._interrupted(trainer, stream) from None
        self._save(sae, plan, metrics)
        if stream.cache is not None:
            stream.cache.flush()
            stream.cache.close()
        for directory in (self.checkpoints, self.work):
            shutil.rmtree(directory, ignore_errors=True)
        return sae

    # --- what the run reads ---

    def _last_checkpoint(self) -> dict:
        found = steps(self.checkpoints)
        if not found:
            return {}
        state, settings = load_checkpoint(self.checkpoints, found[-1])
        check_settings(settings, self.settings, self.checkpoints)
        return state

    def _corpus(self) -> TokenStore:
        """The token ids in work/tokens, made once: a resumed run reads the same file."""
        c = self.config
        files = text_files(self._samples() if c.samples else c.text)
        wanted = {
            "text": [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files],
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "ctx_len": c.ctx_len,
            "pack": not c.samples if c.pack is None else c.pack,
            "limit": None if c.tokens is None else (c.tokens + c.eval_tokens) * 5 // 4 + c.ctx_len,
        }
        directory = self.work / "tokens"
        if (directory / "about.json").exists():
            store = TokenStore(directory)
            if {name: store.about.get(name) for name in wanted} == wanted:
                return store
        with Progress("tokenizing", wanted["limit"], on=self.progress) as bar:
            sequences = tokenize(texts(files), self.tokenizer, c.ctx_len, pack=wanted["pack"])
            limit = wanted["limit"]
            return TokenStore.build(sequences, directory, limit=limit, about=wanted, report=bar.to)

    def _samples(self) -> Path:
        c = self.config
        with Progress("sampling", c.samples, on=self.progress) as bar:
            return write_samples(
                self.output / "samples.jsonl.gz",
                self.model,
                self.tokenizer,
                c.samples,
                prompts=c.prompts,
                length=c.ctx_len,
                seed=c.seed,
                temperature=c.temperature,
                top_p=c.top_p,
                report=bar.to,
            )

    def _split(self, store: TokenStore) -> tuple[np.ndarray, np.ndarray]:
        """(training, held-out) sequences: eval_tokens held out, at most a tenth of the corpus."""
        kept = store.kept(special_ids(self.tokenizer), self.config.skip_positions)
        order = np.random.default_rng([self.config.seed, len(store)]).permutation(len(store))
        held = int(np.searchsorted(kept[order].cumsum(), self.config.eval_tokens)) + 1
        held = min(held, len(store) // 10) if self.config.eval_tokens else 0
        return np.sort(order[held:]), np.sort(order[:held])

    def _stream(
        self, store: TokenStore, training: np.ndarray, signals: Signals
    ) -> ActivationStream:
        c = self.config
        return ActivationStream(
            self.model,
            self.tokenizer,
            store,
            c.layer,
            batch_tokens=c.batch_tokens,
            batch_size=c.model_batch_size,
            buffer_tokens=c.buffer_tokens,
            seed=c.seed,
            skip_positions=c.skip_positions,
            sequences=training,
            check=signals.check,
        )

    def _same_corpus(self, state: dict, store: TokenStore) -> None:
        if state and state["tokens_digest"] != store.digest:
            raise FastsaeError(
                f"resume: the text changed since {self.checkpoints} was written; restore it, or "
                "use resume='never' to start over"
            )

    def _cache(self, stream, plan: Plan, state: dict) -> ActivationCache | None:
        setting = self.config.activation_cache
        path = self.work / "activations.bin" if setting == "auto" else Path(setting or "")
        rows, width = int(stream.kept.sum()), plan.d_in
        if state:
            # The first run decided; another decision would round the activations differently.
            dtype = state["cache_dtype"]
            if dtype is not None and not path.exists():
                raise FastsaeError(
                    f"resume: the activation cache {path} of this run is missing; restore it, or "
                    "use resume='never' to start over"
                )
        else:
            dtype = self._cache_dtype(stream, plan, rows)
            if setting == "auto":
                for file in self.work.glob("activations.bin*"):
                    file.unlink()
        if dtype is None:
            return None
        key = {
            "model_weights": self.model_weights,
            "hook": list(stream.hook),
            "tokens": stream.store.digest,
            "skipped": [stream.skip_positions, *stream.special],
        }
        return ActivationCache(path, rows, width, len(stream.store), dtype, key)

    def _cache_dtype(self, stream, plan: Plan, rows: int) -> str | None:
        """The model's dtype if such a cache fits, else bfloat16 if that does, else None."""
        c = self.config
        auto = c.activation_cache == "auto"
        if c.activation_cache is None:
            return None
        if auto and plan.steps * c.batch_tokens < 1.2 * stream.corpus_tokens:
            return None
        room = c.cache_gb * 1e9
        if auto:
            room = min(room, shutil.disk_usage(self.work).free / 2)
        own = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        for dtype in (own, "bfloat16"):
            size = rows * plan.d_in * getattr(torch, dtype).itemsize
            if dtype in ("float32", "bfloat16", "float16") and size <= room:
                return dtype
        if auto:
            return None
        needed = rows * plan.d_in * 2 / 1e9
        raise FastsaeError(
            f"activation_cache: it needs {needed:.1f} GB in bfloat16, cache_gb is {c.cache_gb}"
        )

    # --- what the run does ---

    def _loop(self, trainer: Trainer, stream: ActivationStream, signals: Signals) -> None:
        c, plan = self.config, trainer.plan
        log = Log(self.output / "train_log.jsonl", trainer.steps_done)
        if not trainer.scale:
            trainer.start(self._first_rows(stream, signals))
        first, began = trainer.steps_done, time.monotonic()
        start = first * c.batch_tokens
        with Progress(
            "training", plan.steps * c.batch_tokens, start=start, on=self.progress
        ) as bar:
            if first:
                bar.say(f"resumed at step {first} of {plan.steps}")
            while (step := trainer.steps_done) < plan.steps:
                lr = plan.lr_at(step)
                trainer.step(next(stream))
                step += 1
                if step % c.log_every == 0 or step == plan.steps:
                    rate = (step - first) * c.batch_tokens / (time.monotonic() - began)
                    record = {"step": step, "tokens": step * c.batch_tokens} | trainer.metrics()
                    record |= {"lr": lr, "tokens_per_s": round(rate, 1)}
                    log.add(record)
                    bar.to(
                        record["tokens"],
                        FVU=f"{record['fvu']:.4f}",
                        L0=f"{record['l0']:.1f}",
                        dead=f"{record['dead']:.1%}",
                        speed=f"{rate:,.0f} tok/s",
                    )
                    if self.on_log is not None:
                        self.on_log(record)
                if step % c.checkpoint_every == 0 or step == plan.steps:
                    self._checkpoint(trainer, stream)
                signals.check()

    def _first_rows(self, stream: ActivationStream, signals: Signals) -> Tensor:
        """The first activations; filling the buffer may take minutes, so it is shown."""
        with Progress("filling the shuffle buffer", None, on=self.progress) as bar:

            def check():
                signals.check()
                bar.to(stream.buffered)

            stream.check = check
            rows = stream.peek(_START_ROWS)
            bar.to(stream.buffered)
        stream.check = signals.check
        return rows

    def _checkpoint(self, trainer: Trainer, stream: ActivationStream) -> None:
        if trainer.steps_done in steps(self.checkpoints):
            return
        state = {
            "trainer": trainer.state_dict(),
            "stream": stream.state_dict(),
            "tokens_digest": stream.store.digest,
            "cache_dtype": None
            if stream.cache is None
            else str(stream.cache.dtype).removeprefix("torch."),
        }
        save_checkpoint(self.checkpoints, trainer.steps_done, state, self.settings)

    def _interrupted(self, trainer: Trainer, stream: ActivationStream) -> Interrupted:
        self._checkpoint(trainer, stream)
        return Interrupted(
            f"interrupted at step {trainer.steps_done} of {trainer.plan.steps}; the checkpoint is "
            f"in {self.checkpoints}; run the same command to continue"
        )

    def _finish(self, trainer, stream, held_out: np.ndarray, signals) -> tuple[SAE, dict]:
        """The SAE with its statistics over training text, and its metrics over held-out text."""
        c, plan = self.config, trainer.plan
        place = resolve_hook(c.layer)
        side = "post" if place.side == "output" else "pre"
        config = SAEConfig(
            d_in=plan.d_in,
            d_sae=plan.d_sae,
            k=c.k,
            dtype=c.dtype,
            hook_name=f"blocks.{place.layer}.hook_resid_{side}",
            model_name=c.model,
        )
        sae = trainer.export(config, stream.device)
        order = np.random.default_rng([c.seed, 1]).permutation(stream.sequences)

        def rows(sequences: np.ndarray, tokens: int, title: str) -> Iterator[Tensor]:
            counts = stream.kept[sequences].cumsum()
            sequences = np.sort(sequences[: int(np.searchsorted(counts, tokens)) + 1])
            seen = 0
            with Progress(title, int(stream.kept[sequences].sum()), on=self.progress) as bar:
                for batch in stream.rows(sequences):
                    signals.check()
                    yield trainer.typical(batch.float())
                    bar.to(seen := seen + len(batch))

        sae.stats = feature_stats(sae, rows(order, c.stats_tokens, "statistics"))
        measured = held_out if len(held_out) else order
        metrics = reconstruction(sae, rows(measured, max(1, c.eval_tokens), "evaluation"))
        metrics["held_out"] = bool(len(held_out))
        metrics["dead"] = trainer.metrics()["dead"]
        metrics |= {"steps": plan.steps, "training_tokens": plan.steps * c.batch_tokens}
        return sae, metrics | {"corpus_tokens": stream.corpus_tokens}

    def _save(self, sae: SAE, plan: Plan, metrics: dict) -> None:
        public = {k: v for k, v in self.config.to_dict().items() if k not in ("output", "prompts")}
        metadata = {"training": public | dataclasses.asdict(plan), "metrics": metrics}
        sae.config = dataclasses.replace(sae.config, metadata=metadata)
        with disk_errors("the SAE", self.output):
            sae.save_pretrained(self.output)
            # Last: its presence means that the run is complete.
            write_json(self.output / "train.json", {"settings": self.settings, "metrics": metrics})


def _finished(config: TrainConfig, output: Path) -> SAE:
    record = json.loads((output / "train.json").read_text())
    free = ("output", "checkpoint_every", "log_every", "resume", "device")
    check_settings(record["settings"], config.to_dict(), output, free)
    return SAE.from_pretrained(output, device=config.device)


def train(
    config: TrainConfig,
    *,
    model: nn.Module | None = None,
    tokenizer=None,
    progress: bool = True,
    on_log: Callable[[dict], None] | None = None,
) -> SAE:
    """Train an SAE as `config` says; it is saved in config.output with its feature statistics.

    model and tokenizer, given together, replace loading config.model. on_log receives each record
    of train_log.jsonl: step, tokens, fvu, l0, dead (share), lr, tokens_per_s.

    The directory holds cfg.json and weights (`SAE.save_pretrained`), train.json (settings, final
    metrics), train_log.jsonl, samples.jsonl.gz if the model wrote its own corpus, and during the
    run checkpoints/ (the last two) and work/ (token ids, cached activations). The same command
    continues an interrupted run bit for bit, and returns the SAE if there is nothing left to do.

    Raises FastsaeError for what the user can fix, Interrupted (a KeyboardInterrupt) after SIGINT or
    SIGTERM, once a checkpoint is written.
    """
    if (model is None) != (tokenizer is None):
        raise FastsaeError("model, tokenizer: give both or neither")
    output = Path(config.output)
    if config.resume == "never":
        for name in ("train.json", "samples.jsonl.gz", "samples.jsonl.gz.json"):
            (output / name).unlink(missing_ok=True)
        for name in ("checkpoints", "work"):
            shutil.rmtree(output / name, ignore_errors=True)
    elif (output / "train.json").exists():
        return _finished(config, output)
    if config.resume == "must" and not steps(output / "checkpoints"):
        raise FastsaeError(f"resume: there is no checkpoint in {output / 'checkpoints'}")
    if model is None:
        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = config.model_dtype or ("float32" if device == "cpu" else "bfloat16")
        if config.text:
            text_files(config.text)  # a missing file need not wait for the model to load
        model, tokenizer = load_model(config.model, dtype=dtype, device=device)
    return _Run(config, model, tokenizer, progress, on_log).train()
