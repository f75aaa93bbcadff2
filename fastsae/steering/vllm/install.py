"""Wrap the few places of vLLM that this plugin needs, after checking that they are all there."""

import functools
import importlib
import inspect
import re
import time

from fastsae.errors import FastsaeError
from fastsae.steering.vllm import batch
from fastsae.steering.vllm import settings as config
from fastsae.steering.vllm.settings import KEY

TESTED = ((0, 32), (0, 34))  # from, and below: what was run or read
V1 = "vllm.v1.worker.gpu_model_runner"
V2 = "vllm.v1.worker.gpu.model_runner"
# module, class (or ""), function, the parameters we rely on
SURFACES = (
    ("vllm.v1.engine.core", "EngineCore", "_initialize_kv_caches", ("vllm_config",)),
    ("vllm.v1.engine.core", "EngineCore", "preprocess_add_request", ("request",)),
    ("vllm.v1.engine.core", "EngineCore", "collective_rpc", ("method", "timeout", "args")),
    ("vllm.v1.core.sched.scheduler", "Scheduler", "__init__", ("vllm_config",)),
    ("vllm.v1.core.sched.scheduler", "Scheduler", "add_request", ("request",)),
    ("vllm.v1.core.sched.scheduler", "Scheduler", "schedule", ()),
    ("vllm.v1.core.sched.scheduler", "Scheduler", "_free_request", ("request",)),
    (
        "vllm.v1.core.sched.scheduler",
        "Scheduler",
        "finish_requests",
        ("request_ids", "finished_status"),
    ),
    ("vllm.v1.core.sched.scheduler", "Scheduler", "get_num_unfinished_requests", ()),
    ("vllm.v1.worker.worker_base", "WorkerBase", "__init__", ("vllm_config",)),
    (V1, "GPUModelRunner", "load_model", ()),
    (V1, "GPUModelRunner", "_update_states", ("scheduler_output",)),
    (V1, "GPUModelRunner", "_dummy_run", ()),
    (
        "vllm.v1.engine.output_processor",
        "OutputProcessor",
        "process_outputs",
        ("engine_core_outputs",),
    ),
    ("vllm.entrypoints.launchers.app", "", "init_entrypoints_middleware", ("args", "app")),
)
# routes whose bodies become requests with extra args, if their fields have `vllm_xargs`
ROUTES = (
    ("/v1/completions", "vllm.entrypoints.openai.completion.protocol", "CompletionRequest"),
    (
        "/v1/chat/completions",
        "vllm.entrypoints.openai.chat_completion.protocol",
        "ChatCompletionRequest",
    ),
    ("/v1/responses", "vllm.entrypoints.openai.responses.protocol", "ResponsesRequest"),
    ("/v1/messages", "vllm.entrypoints.anthropic.protocol", "AnthropicMessagesRequest"),
)
V2_SURFACES = (
    (V2, "GPUModelRunner", "load_model", ()),
    (V2, "GPUModelRunner", "prepare_inputs", ("scheduler_output",)),
    (V2, "GPUModelRunner", "finish_requests", ("scheduler_output",)),
    (V2, "GPUModelRunner", "_dummy_run", ()),
)
CPU_RUNNER = "vllm.v1.worker.cpu_model_runner"


def problem(version: str, surfaces=SURFACES) -> str | None:
    """Why this vLLM cannot be steered, or None."""
    low, high = (".".join(map(str, bound)) for bound in TESTED)
    found = re.match(r"(\d+)\.(\d+)", version)
    if not found or not TESTED[0] <= tuple(map(int, found.groups())) < TESTED[1]:
        return f"fastsae steers vLLM >= {low}, < {high}; this is {version}: install one of those"
    for module, owner, name, needed in surfaces:
        where = ".".join(filter(None, (module, owner, name)))
        try:
            holder = importlib.import_module(module)
            function = getattr(getattr(holder, owner) if owner else holder, name)
        except (ImportError, AttributeError) as error:
            return f"vLLM {version} has no {where} ({error}); install another of >= {low}, < {high}"
        accepted = inspect.signature(function).parameters
        lacking = [each for each in needed if each not in accepted]
        if lacking:
            return f"vLLM {version}: {where} takes no {', '.join(lacking)}"
    return None


def refused(parallel, settings: config.Settings) -> str | None:
    """Why policies that an admin route loads would not reach every engine, or None."""
    if parallel.data_parallel_size < 2 or settings.admin_keys is None:
        return None
    advice = "leave admin_keys out, and every engine serves the policies of its file"
    if parallel.local_engines_only:
        return (
            "fastsae.admin_keys: a server of --data-parallel-external-lb or -hybrid-lb reaches its "
            f"own engines only, a policy loaded there would be unknown to the others; {advice}"
        )
    if parallel.enable_elastic_ep:
        return (
            "fastsae.admin_keys: an engine that --enable-elastic-ep adds later does not know the "
            f"policies loaded before; {advice}"
        )
    client = importlib.import_module("vllm.v1.engine.core_client").AsyncMPClient
    if not hasattr(client, "call_utility_all_async"):
        return f"fastsae.admin_keys: this vLLM cannot ask every data-parallel engine; {advice}"
    return None


def install() -> None:
    """Idempotent. A vLLM we cannot steer still serves, unless it is configured to be steered."""
    import vllm
    from vllm.config import VllmConfig

    if getattr(VllmConfig, "_fastsae", False):
        return
    VllmConfig._fastsae = True
    why = problem(vllm.__version__)
    _check_settings(VllmConfig, why, problem(vllm.__version__, V2_SURFACES) if not why else None)
    if why is not None:
        return
    _wrap_engine()
    _wrap_workers()
    _wrap_server()


def _check_settings(vllm_config, why: str | None, why_v2: str | None) -> None:
    """Mistakes in the settings, and what stands against steering here, stop the start."""

    @_wrap(vllm_config, "__post_init__")
    def _(original, self, *args, **kwargs):
        original(self, *args, **kwargs)
        settings = config.from_config(self.additional_config)
        if settings is None:
            return
        if why is not None:
            raise FastsaeError(why)
        against = refused(self.parallel_config, settings)
        if against is not None:
            raise FastsaeError(against)
        if why_v2 is not None and getattr(self, "use_v2_model_runner", False):
            raise FastsaeError(f"{why_v2}; or start with VLLM_USE_V2_MODEL_RUNNER=0")


def _wrap(owner, name: str):
    """Decorator: replace owner.name by function(original, ...)."""

    def put(function):
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(*args, **kwargs):
            return function(original, *args, **kwargs)

        setattr(owner, name, wrapped)
        return wrapped

    return put


def _wrap_engine() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore

    from fastsae.steering.vllm.engine import EngineSteering, Gate

    EngineCore.fastsae = Scheduler.fastsae = None

    # The constructor itself is what loads plugins, too late to be wrapped. By this step of it the
    # workers have loaded the model; the scheduler comes after.
    @_wrap(EngineCore, "_initialize_kv_caches")
    def _(original, self, *args, **kwargs):
        returned = original(self, *args, **kwargs)
        settings = config.from_config(self.vllm_config.additional_config)
        if settings is not None and self.fastsae is None:
            self.fastsae = EngineSteering(self, settings)
        return returned

    @_wrap(Scheduler, "__init__")
    def _(original, self, *args, **kwargs):
        original(self, *args, **kwargs)
        settings = config.from_config(self.vllm_config.additional_config)
        if settings is not None:
            self.fastsae = Gate(self, settings)

    @_wrap(EngineCore, "preprocess_add_request")
    def _(original, self, request):
        extra = request.sampling_params and request.sampling_params.extra_args
        if extra and KEY in extra:
            if self.fastsae is None:
                raise FastsaeError(
                    "steering: this server has no fastsae settings; start it with --additional-"
                    'config \'{"fastsae": {"sites": [{"sae": …}]}}\''
                )
            loaded = self.fastsae.resolve(request)
            prepared = original(self, request)
            prepared[0].fastsae = loaded
            return prepared
        return original(self, request)

    @_wrap(EngineCore, "collective_rpc")
    def _(original, self, method, timeout=None, args=(), kwargs=None):
        if method != KEY:
            return original(self, method, timeout, args, kwargs)
        if self.fastsae is None:
            return ['{"error": "this server has no fastsae settings"}']
        return [self.fastsae.command(*args)]


def _wrap_workers() -> None:
    from vllm.v1.worker.worker_base import WorkerBase

    def command(self, text: str) -> str:
        return self.model_runner._fastsae.command(text)

    setattr(WorkerBase, KEY, command)
    v1 = importlib.import_module(V1).GPUModelRunner
    arming = [v1]
    try:
        cpu = importlib.import_module(CPU_RUNNER).CPUModelRunner
        arming += [cpu] if "load_model" in vars(cpu) else []
    except ImportError:
        pass  # a build for another device
    for runner in arming:
        _arm_after_loading(runner)

    @_wrap(v1, "_update_states")
    def _(original, self, scheduler_output):
        returned = original(self, scheduler_output)
        if self._fastsae is not None:
            self._fastsae.begin(batch.of_v1(self, scheduler_output))
        return returned

    _clear_in_dummy_runs(v1)
    _wrap_v2()


def _wrap_v2() -> None:
    """The V2 runner needs Triton to be imported; where it is unusable there is nothing to wrap."""
    import vllm

    if problem(vllm.__version__, V2_SURFACES) is not None:
        return  # a configuration that asks for it does not start
    v2 = importlib.import_module(V2).GPUModelRunner
    _arm_after_loading(v2)
    _clear_in_dummy_runs(v2)

    @_wrap(v2, "finish_requests")
    def _(original, self, scheduler_output):
        if self._fastsae is not None:
            gone = set(scheduler_output.finished_req_ids)
            self._fastsae.finish(gone | set(scheduler_output.preempted_req_ids or ()))
        return original(self, scheduler_output)

    @_wrap(v2, "prepare_inputs")
    def _(original, self, scheduler_output, *args, **kwargs):
        prepared = original(self, scheduler_output, *args, **kwargs)
        if self._fastsae is not None:
            self._fastsae.begin(batch.of_v2(scheduler_output, prepared))
        return prepared


def _arm_after_loading(runner) -> None:
    from fastsae.steering.vllm.worker import arm

    runner._fastsae = None

    @_wrap(runner, "load_model")
    def _(original, self, *args, **kwargs):
        returned = original(self, *args, **kwargs)
        if self._fastsae is None:  # a subclass may call its parent's, wrapped as well
            self._fastsae = arm(self, self.get_model())
        return returned


def _clear_in_dummy_runs(runner) -> None:
    @_wrap(runner, "_dummy_run")
    def _(original, self, *args, **kwargs):
        if self._fastsae is not None:
            self._fastsae.clear()
        return original(self, *args, **kwargs)


def _wrap_server() -> None:
    """A server with fastsae settings owns the body field "steering", named --middleware or not."""
    from vllm.entrypoints.launchers import app as launcher

    from fastsae.steering.control import LatencyGuard

    @_wrap(launcher, "init_entrypoints_middleware")
    def _(original, args, app, *more, **kwargs):
        from fastsae.steering.vllm.middleware import SteeringMiddleware

        settings = config.from_config(getattr(args, "additional_config", None))
        if settings is not None:
            # The innermost: authentication and the other limits of the server come first.
            guard = LatencyGuard(settings.latency_budget_ms)
            if settings.latency_budget_ms is not None:
                _time_tokens(guard)
            app.add_middleware(
                SteeringMiddleware,
                settings=settings,
                app_state=app.state,
                routes=steerable(),
                guard=guard,
            )
        return original(args, app, *more, **kwargs)


def steerable() -> list[str]:
    """The routes of this vLLM that hand extra args on; on any other a wish would be lost."""
    found = []
    for route, module, name in ROUTES:
        kind = getattr(importlib.import_module(module), name, None)
        if "vllm_xargs" in getattr(kind, "model_fields", {}):
            found.append(route)
    return found


def _time_tokens(guard) -> None:
    """The guard sees the milliseconds between a request's tokens, of every request."""
    from vllm.v1.engine.output_processor import OutputProcessor

    @_wrap(OutputProcessor, "process_outputs")
    def _(original, self, engine_core_outputs, *args, **kwargs):
        now = time.monotonic()
        for output in engine_core_outputs:
            state = self.request_states.get(output.request_id)
            if state is not None and output.new_token_ids:
                last = getattr(state, "fastsae_last", None)
                state.fastsae_last = now
                if last is not None:
                    guard.token(1e3 * (now - last) / len(output.new_token_ids))
        return original(self, engine_core_outputs, *args, **kwargs)
