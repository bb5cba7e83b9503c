"""What every test runs under: eight CPU devices, a compilation cache, and checked array shapes."""

import collections
import gc
import itertools
import os
import re
import time
from pathlib import Path

START = time.monotonic()
ROOT = Path(__file__).parent.parent

# read once, when jax is first imported; commands that tests start inherit them
os.environ.setdefault("JAX_PLATFORMS", "cpu")
XLA_FLAGS = {
    "xla_force_host_platform_device_count": 8,
    "xla_cpu_use_fusion_emitters": "false",  # they set up MLIR anew for each fusion: most of what a tiny program costs
    "xla_cpu_parallel_codegen_split_count": 1,  # modules that two cores compile side by side take more of both
}
for flag, value in XLA_FLAGS.items():
    if flag not in (given := os.environ.get("XLA_FLAGS", "")):
        os.environ["XLA_FLAGS"] = f"{given} --{flag}={value}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # most programs here run for less time than they compile
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # workers that compile for TPUs hold none

import jax  # noqa: E402 - the environment comes first
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

_register_dataclass = jax.tree_util.register_dataclass


def _register_unchecked(cls, *args, **kwargs):
    """Rebuilt by jax, a pytree also holds shapes, shardings and arrays with other axes: its fields go unchecked."""
    cls.__no_type_check__ = True
    return _register_dataclass(cls, *args, **kwargs)


jax.tree_util.register_dataclass = _register_unchecked
_jaxtyped = jaxtyping.jaxtyped


def _jaxtyped_if_of_arrays(*, typechecker):
    """The hook's decorator; functions whose signature names no arrays stay as they are, and cost nothing."""

    def decorate(item):
        arrays = "jaxtyping." in repr(getattr(item, "__annotations__", {}))
        return _jaxtyped(item, typechecker=typechecker) if arrays else item

    return decorate


jaxtyping.jaxtyped = _jaxtyped_if_of_arrays
jaxtyping.install_import_hook("vlmem_jax", "beartype.beartype")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of reference numbers, a subfolder a system; VLMEM_GOLDEN names another set of the same format."""
    return Path(os.environ.get("VLMEM_GOLDEN", ROOT / "tests" / "golden"))


@pytest.fixture(scope="session")
def gcs():
    """What this process and its children take for Google Cloud Storage; it has a bucket named `bucket`."""
    pytest.importorskip("gcsfs")
    from tests import gcs

    return gcs.serve("bucket")


@pytest.fixture
def bucket(gcs, request):
    """A folder in a bucket, of this test alone."""
    gcs.refuse = lambda name: False
    return f"gs://bucket/{re.sub(r'[^a-z0-9]+', '-', request.node.name)}"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """What this process takes for the Hugging Face hub, empty; the working folder is the test's own."""
    from huggingface_hub import constants

    from tests.hf_hub import TOKEN, Hub
    from vlmem_jax.hub import repos

    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    repos._fetched.cache_clear()
    yield hub
    hub.shutdown()


def pytest_addoption(parser):
    parser.addoption("--seconds", type=float, help="skip tests whose turn comes later than this; keep the order given")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist writes the groups into the names of the tests
def pytest_collection_modifyitems(config, items):
    """A file's tests share a worker, and with it compiled programs and fixtures (under `--dist loadgroup`).

    Groups with most slow tests begin first: a long one that began last would be waited for.
    """
    groups = collections.defaultdict(list)
    for item in items:
        marker = item.get_closest_marker("xdist_group")
        name = marker.args[0] if marker else item.nodeid.split("::")[0]
        if marker is None:
            item.add_marker(pytest.mark.xdist_group(name))
        groups[name].append(item)
    if config.getoption("seconds") is None:

        def size(group):
            return sum(item.get_closest_marker("slow") is not None for item in group), len(group)

        items[:] = itertools.chain.from_iterable(sorted(groups.values(), key=size, reverse=True))


def pytest_collection_finish():
    """Modules imported by now stay: the collector need not look at them again with each program traced."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Skips what comes too late."""
    limit = item.config.getoption("seconds")
    if limit is not None and time.monotonic() - START > limit:
        pytest.skip(f"{limit:g} seconds are over")


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Compiled programs of a finished file are not needed again; kept, they fill the memory."""
    yield
    import jax

    jax.clear_caches()


@pytest.fixture(scope="module")
def one_device():
    """Meshes of one device, in this process and in those that tests start, as on a laptop."""
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: first)
        patch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1")
        yield


@pytest.fixture
def packed_kernel(monkeypatch):
    """Makes causal attention that of our own kernel, by the name of a backend, with blocks that fit short rows; of
    programs not traced yet."""
    from kernels_pallas.causal_attention import blocks
    from vlmem_jax.nn import attention

    def use(backend):
        monkeypatch.setattr(attention, "packed_backend", lambda *_: backend)
        for name in ("FORWARD", "BACKWARD"):
            monkeypatch.setattr(blocks, name, (blocks.Blocks(128, 2, keys=128, part=128, together=2),))

    return use
