"""Steering inside vLLM, as a plugin: two entry points, everything else imported inside them.

vLLM swallows an exception raised while it imports a plugin and serves on without it; one raised
inside the function stops the process. So this file imports nothing.
"""


def register() -> None:
    """Entry point `vllm.general_plugins`: runs in every process of vLLM, possibly several times."""
    from fastsae.steering.vllm.install import install

    install()


def endpoints():
    """Entry point `vllm.endpoint_plugins`: the admin routes (only with VLLM_PLUGINS=fastsae)."""
    from fastsae.steering.vllm.admin import Endpoints

    return Endpoints()
