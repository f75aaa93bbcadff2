"""`vllm serve`, which starts several servers and engines, also for the CPU build of vLLM.

That is a distribution of another name than the command looks for.
"""

import importlib.metadata

_version = importlib.metadata.version


def version(name: str) -> str:
    try:
        return _version(name)
    except importlib.metadata.PackageNotFoundError:
        return _version(f"{name}-cpu") + "+cpu"


importlib.metadata.version = version  # in every process: those that are spawned run this file too

from vllm.entrypoints.cli.main import main  # noqa: E402

if __name__ == "__main__":
    main()
