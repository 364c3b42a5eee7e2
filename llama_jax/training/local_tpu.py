"""Which TPU this machine has, found before JAX starts, and quiet where it has none.

Flags must be set before libtpu is loaded, so JAX can't be asked. Doesn't import JAX.
"""

import dataclasses
import os
import re
import urllib.error
import urllib.request
from collections.abc import MutableMapping
from pathlib import Path

from llama_jax.config.hardware import CHIPS, Chip, Slice, find_slice
from llama_jax.config.loading import ConfigError

GOOGLE_PCI_VENDOR = "0x1ae0"
# PCI device numbers of TPUs, as JAX's hardware_utils has them; None is a chip without a row.
# Google's network cards and disks have others, so the vendor alone doesn't tell.
CHIP_OF_PCI_DEVICE = {
    "0x0027": None,  # v3
    "0x0056": None,
    "0x005e": "v4",
    "0x0062": "v5p",
    "0x0063": "v5e",
    "0x006f": "v6e",
    "0x0076": "tpu7x",
}

# What a machine with a TPU has set by itself (GKE, Colab, a container made for it), or a user who
# wants TPUs. With any of them nothing is silenced.
TELLS_OF_A_TPU = (
    "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "TPU_NAME",
    "TPU_WORKER_ID", "COLAB_TPU_ADDR", "JAX_FORCE_TPU_INIT",
)  # fmt: skip

# What libtpu would ask a metadata server for, and complain about not getting. Any values that it
# can read do: there is no TPU to apply them to, and topologies that are only compiled for bring
# their own. The last lets other processes load libtpu as well, since none drives a chip.
QUIET_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

METADATA_TIMEOUT_S = 2.0


@dataclasses.dataclass(frozen=True)
class LocalTpu:
    """The TPU that this machine is (a worker of).

    Attributes:
      chip: its kind.
      slice: all of it, as its accelerator type says; None where that isn't known.
      num_slices: slices of the job, told by the launcher's MEGASCALE variables.
    """

    chip: Chip
    slice: Slice | None
    num_slices: int = 1

    @property
    def num_devices(self) -> int | None:
        """JAX devices of all slices, None where the slice isn't known."""
        return None if self.slice is None else self.slice.num_devices * self.num_slices

    def __str__(self) -> str:
        name = self.chip.name if self.slice is None else self.slice.name
        return name if self.num_slices == 1 else f"{self.num_slices} x {name}"


def local_tpu(
    environment: MutableMapping[str, str] = os.environ, root: Path = Path("/")
) -> LocalTpu | None:
    """The TPU of this machine, or None where there is none, or one too old to have a row.

    The PCI bus tells the chip: it holds on every VM and in containers. How large the slice is
    stands in the environment on GKE, and on Cloud's VMs only with the metadata server, which is
    asked only where a TPU has been found, and waited for `METADATA_TIMEOUT_S` at most.

    Args:
      environment: to be read.
      root: of the file system, for tests.
    """
    chip = _chip_on_the_bus(root)
    if chip is None:
        return None
    slice_ = _slice_of(chip, environment)
    return LocalTpu(chip, slice_, _num_slices(environment))


def has_tpu(environment: MutableMapping[str, str] = os.environ, root: Path = Path("/")) -> bool:
    """Whether anything speaks for a TPU here: the PCI bus, device files, or the environment."""
    return (
        any(environment.get(name) for name in TELLS_OF_A_TPU)
        or any(
            True for pattern in ("dev/accel[0-9]*", "dev/vfio/[0-9]*") for _ in root.glob(pattern)
        )
        or bool(_devices_on_the_bus(root))
    )


def quiet_absent_tpu(
    environment: MutableMapping[str, str] = os.environ, root: Path = Path("/")
) -> None:
    """Where there is no TPU, keep libtpu from looking for one: no noise and no waiting.

    To be called before JAX is imported. libtpu may be installed all the same, for compiling ahead
    of time, and JAX then tries it. A machine with a TPU is left alone, so that what goes wrong
    with it is seen; so is a variable that is set already.
    """
    if has_tpu(environment, root):
        return
    for name, value in QUIET_ENVIRONMENT.items():
        environment.setdefault(name, value)


def _chip_on_the_bus(root: Path) -> Chip | None:
    names = (CHIP_OF_PCI_DEVICE[device] for device in _devices_on_the_bus(root))
    return next((CHIPS[name] for name in names if name is not None), None)


def _devices_on_the_bus(root: Path) -> list[str]:
    """PCI device numbers of the TPUs on the bus."""
    found = []
    for vendor in sorted(root.glob("sys/bus/pci/devices/*/vendor")):
        try:
            if vendor.read_text().strip() == GOOGLE_PCI_VENDOR:
                found.append((vendor.parent / "device").read_text().strip().lower())
        except OSError:
            continue  # a device that has gone, or that this container may not see
    return [device for device in found if device in CHIP_OF_PCI_DEVICE]


def _slice_of(chip: Chip, environment: MutableMapping[str, str]) -> Slice | None:
    topology = environment.get("TPU_TOPOLOGY", "")
    name = environment.get("TPU_ACCELERATOR_TYPE") or _metadata("accelerator-type", environment)
    for text in (f"{chip.name}:{topology}" if topology else "", name):
        if not text:
            continue
        try:
            found = find_slice(text)
        except ConfigError:
            continue  # GKE's name of a machine, or a size newer than our table
        # A container may carry the name of another machine; what is on the bus is sure.
        if found.chip is chip:
            return found
    return None


def _num_slices(environment: MutableMapping[str, str]) -> int:
    number = environment.get("MEGASCALE_NUM_SLICES")
    if number is None:
        # Lines such as MEGASCALE_NUM_SLICES: '2', where JAX looks too.
        told = _metadata("tpu-env", environment) or ""
        found = re.search(r"^\s*MEGASCALE_NUM_SLICES\s*:\s*'?(\d+)", told, re.MULTILINE)
        number = found[1] if found else ""
    return int(number) if number.isdigit() else 1


def _metadata(key: str, environment: MutableMapping[str, str]) -> str | None:
    """An attribute of this VM from Cloud's metadata server, None where none answers."""
    if environment.get("TPU_SKIP_MDS_QUERY"):
        return None
    server = environment.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=METADATA_TIMEOUT_S) as answer:
            return answer.read().decode().strip()
    except (OSError, urllib.error.URLError):
        return None
