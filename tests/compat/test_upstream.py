"""The peers' own tests, from their source distributions, against accelerated objects.

`make test-compat` puts the distributions into the environment. What is left out, and why, is in
EXCLUDED; what a distribution does not contain is checked, so that tests of a later version count.
"""

import importlib.metadata
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

SDISTS = Path(sys.prefix) / "sdists"
# Distribution -> its test files. Two ship none: test_saelens*.py and test_dictionary_learning.py
# stand in for them.
TESTS = {
    "sae-lens": set(),
    "dictionary-learning": set(),
    "eai-sparsify": {
        "test_auxk_loss.py",
        "test_decode.py",
        "test_encode.py",
        "test_micro_acc_steps.py",
        "test_multiple_saes.py",
    },
}
EXCLUDED = {
    "test_decode.py": "its Triton decoder against its eager one, on a GPU: no SparseCoder",
    "test_encode.py": "tests FusedEncoder on its own (8192 x 131072 on a GPU): no SparseCoder",
}
# Every SparseCoder that a test makes or loads is accelerated; calls are counted at the end.
PLUGIN = """
import functools
import sparsify.sparse_coder as peer
from fastsae import compat
from fastsae.compat import sparsify as ours

made, calls = [], []
init = peer.SparseCoder.__init__

@functools.wraps(init)
def accelerated(self, *args, **kwargs):
    init(self, *args, **kwargs)
    compat.accelerate(self, pre_acts=True)
    made.append(1)

def counted(function):
    @functools.wraps(function)
    def call(self, x, *args, **kwargs):
        assert self._serves(x), "this call went to sparsify's own code"
        calls.append(1)
        return function(self, x, *args, **kwargs)
    return call

peer.SparseCoder.__init__ = accelerated
for name in ("encode", "forward"):
    setattr(ours._Coder, name, counted(getattr(ours._Coder, name)))

def pytest_sessionfinish():
    print(f"\\nACCELERATED {len(made)} coders, {len(calls)} calls")
"""


def sdist(name: str) -> tarfile.TarFile:
    version = importlib.metadata.version(name)
    path = SDISTS / f"{name.replace('-', '_')}-{version}.tar.gz"
    assert path.exists(), f"{path} is missing: run make test-compat"
    return tarfile.open(path)


@pytest.mark.parametrize("name", TESTS)
def test_the_distributions_hold_the_tests_that_we_know_of(name):
    with sdist(name) as files:
        found = {Path(n).name for n in files.getnames() if Path(n).name.startswith("test_")}
    assert found == TESTS[name]
    assert set(EXCLUDED) < set(TESTS["eai-sparsify"])


def test_sparsify_s_own_tests_pass_with_accelerated_coders(tmp_path):
    with sdist("eai-sparsify") as files:
        files.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.glob("*/tests")
    for name in EXCLUDED:
        (folder / name).unlink()
    for path in folder.glob("test_*.py"):
        text = path.read_text("utf-8")
        path.write_text(text.replace('"cuda"', '"cpu"'), "utf-8")  # their machine has a GPU
    (folder / "conftest.py").write_text(PLUGIN, "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", str(folder)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout and "failed" not in done.stdout
    counts = [line for line in done.stdout.splitlines() if line.startswith("ACCELERATED")]
    made, calls = (int(word) for word in counts[0].split() if word.isdigit())
    assert made >= 5 and calls >= 20
