"""fastsae serve."""

import os
from pathlib import Path

from fastsae.cli.arguments import command, int_or_str, load_model, model_arguments
from fastsae.errors import FastsaeError


def add_serve(commands) -> None:
    parser = command(
        commands,
        "serve",
        _run_serve,
        "serve a model over HTTP in OpenAI's API; requests name the policy that steers them",
        "fastsae serve my-sae --policies policies/ --port 8000",
    )
    parser.add_argument("sae", nargs="+", help="SAE folder or hub repository; LAYER=SAE")
    parser.add_argument(
        "--policies",
        action="append",
        default=[],
        metavar="PATH",
        help="policy file or folder; LAYER=PATH when several SAEs are attached",
    )
    parser.add_argument("--explanations", help="for feature search; what `explain --output` wrote")
    parser.add_argument("--name", help="what requests call the model (default: --model)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--key-file", help="keys of /v1, one a line (default: open to everybody)")
    parser.add_argument("--admin-key-file", help="keys of /fastsae, one a line (default: closed)")
    parser.add_argument("--max-tokens", type=int, default=1024, help="per request (default 1024)")
    parser.add_argument("--max-running", type=int, default=64, help="requests; more get 429")
    parser.add_argument("--max-batch", type=int, default=32, help="requests in a forward")
    parser.add_argument("--cache-tokens", type=int, default=16384, help="of all running requests")
    parser.add_argument("--max-body", type=int, default=1 << 20, help="bytes of a request")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds a request may take")
    parser.add_argument(
        "--grace",
        type=int,
        default=60,
        help="seconds that running requests have to finish when the server stops",
    )
    parser.add_argument(
        "--latency-budget",
        type=float,
        metavar="MS",
        help="drop optional policies while p95 of a token is above this",
    )
    parser.add_argument("--audit", metavar="FILE", help="a JSON line per request (- for stdout)")
    parser.add_argument("--audit-text", action="store_true", help="with prompts and answers")
    model_arguments(parser)


def _run_serve(args) -> None:
    try:
        import uvicorn

        from fastsae.serve.app import create_app
    except ImportError as error:
        raise FastsaeError(f"{error}; run: pip install 'fastsae-engine[serve]'") from error
    from fastsae.explain import Explanations
    from fastsae.sae import SAE
    from fastsae.serve.audit import Audit
    from fastsae.serve.engine import Engine
    from fastsae.serve.policies import PolicyStore
    from fastsae.serve.state import Settings

    settings = Settings(
        model_name=args.name or args.model,
        keys=_keys("key-file", args.key_file),
        admin_keys=_keys("admin-key-file", args.admin_key_file),
        max_body=args.max_body,
        max_tokens=args.max_tokens,
        default_tokens=min(256, args.max_tokens),
        max_running=args.max_running,
        timeout=args.timeout,
        latency_budget_ms=args.latency_budget,
    )
    saes = {}
    for given in args.sae:
        layer, path = _layered(given)
        sae = SAE.from_pretrained(path).to(args.device)
        saes[sae.config.hook_name if layer is None else layer] = sae
    if len(saes) != len(args.sae) or None in saes:
        raise FastsaeError("sae: give every SAE a layer of its own: LAYER=PATH")
    explanations = Explanations.load(args.explanations) if args.explanations else None
    model, tokenizer = load_model(args)
    engine = Engine(
        model, tokenizer, saes, max_batch=args.max_batch, cache_tokens=args.cache_tokens
    )
    store = PolicyStore(saes, engine.check)
    for given in args.policies:
        layer, path = _layered(given)
        for entry in store.load(path, layer):
            print(f"policy {entry.id}  {entry.policy.digest[:12]}  layer {entry.layer}")
    audit = Audit(args.audit, with_text=args.audit_text)
    app = create_app(engine, store, settings, audit=audit, explanations=explanations)
    uvicorn.run(
        app,
        host=args.host,
        port=args.port,
        log_level="info",
        timeout_graceful_shutdown=args.grace,
    )


def _layered(given: str) -> tuple[int | str | None, str]:
    """(layer, path) of "12=path" or "blocks.12.hook_resid_post=path"; (None, path) of a path."""
    layer, equals, path = given.partition("=")
    return (int_or_str(layer), path) if equals and not os.path.exists(given) else (None, given)


def _keys(option: str, path: str | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        keys = tuple(Path(path).read_text(encoding="utf-8").split())
    except OSError as error:
        raise FastsaeError(f"{option}: cannot read {path}: {error.strerror}") from error
    if not keys:
        raise FastsaeError(f"{option}: {path} holds no key")
    return keys
