"""What machines can do: a row for each TPU chip, the slices that Cloud names, other peaks.

Published figures (Cloud TPU documentation; "How to Scale Your Model" for link, PCIe and DCN
rates; JAX's Pallas table for VMEM), and memory limits read from the compiler. Pure data: no JAX.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

from llama_jax.config.loading import ConfigError, nearest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of TPU chip. Figures are a chip's, also where JAX sees two devices in it.

    `ici_axes` are the dimensions of the torus, `ici_link_bytes_per_s` one link in one direction,
    `host_ram_bytes` a chip's share of its VM's memory, `clock_hz` what the compiler's cycle
    estimates are divided by, `pallas_attention_efficiency` the share of peak that an attention
    kernel is assumed to reach (a head of 128 fills half of a 256-wide matrix unit).
    """

    name: str
    device_kinds: tuple[str, ...]  # what JAX calls its devices, the first as seen today
    topology_family: str  # the prefix that `get_topology_desc` takes
    accelerator_prefix: str  # the prefix of Cloud's accelerator type
    devices_per_chip: int
    cores: int
    name_counts_cores: bool
    peak_flops: Mapping[str, float] = dataclasses.field(hash=False)
    hbm_bytes: int
    usable_hbm_bytes: int
    hbm_bytes_per_s: float
    ici_axes: int
    ici_link_bytes_per_s: float
    dcn_bytes_per_s: float
    clock_hz: float
    pallas_attention_efficiency: float
    vmem_bytes_per_core: int
    host_ram_bytes: int
    chips_per_host: int
    pcie_bytes_per_s: float = 15e9
    chip_config_name: str | None = None  # what `get_topology_desc` needs beside the topology

    @property
    def device_kind(self) -> str:
        """JAX's name of its devices."""
        return self.device_kinds[0]

    def device_peak_flops(self, dtype: str = "bf16") -> float | None:
        """Peak of one JAX device, dense; None when the chip has no such units."""
        peak = self.peak_flops.get(dtype)
        return None if peak is None else peak / self.devices_per_chip

    @property
    def device_hbm_bytes_per_s(self) -> float:
        """HBM bandwidth of one JAX device."""
        return self.hbm_bytes_per_s / self.devices_per_chip

    @property
    def device_usable_hbm_bytes(self) -> int:
        """HBM of one JAX device that a program can have: the compiler's own limit."""
        return self.usable_hbm_bytes // self.devices_per_chip


# `usable_hbm_bytes` is what libtpu 0.0.52 says when a program is too large. Clocks: peak over
# cores x units x 2 x size^2, but for v6e and v7x half of that, which is where the estimated cycles
# of large matmuls come to 70 to 90 % of peak.
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            device_kinds=("TPU v4",),
            topology_family="v4",
            accelerator_prefix="v4",
            devices_per_chip=1,
            cores=2,
            name_counts_cores=True,
            peak_flops={"bf16": 275e12, "int8": 275e12},
            hbm_bytes=32 * GIB,
            usable_hbm_bytes=int(30.75 * GIB),
            hbm_bytes_per_s=1200e9,
            ici_axes=3,
            ici_link_bytes_per_s=45e9,
            dcn_bytes_per_s=6.25e9,  # 25 GB/s a host of 4
            clock_hz=1.05e9,
            pallas_attention_efficiency=0.5,
            vmem_bytes_per_core=16 * 2**20,
            host_ram_bytes=int(407e9 / 4),  # machine type ct4p-hightpu-4t
            chips_per_host=4,
            chip_config_name="megacore",
        ),
        Chip(
            name="v5e",
            device_kinds=("TPU v5 lite", "TPU v5e"),
            topology_family="v5e",
            accelerator_prefix="v5litepod",
            devices_per_chip=1,
            cores=1,
            name_counts_cores=False,
            peak_flops={"bf16": 197e12, "int8": 393e12},
            hbm_bytes=16 * GIB,
            usable_hbm_bytes=int(15.75 * GIB),
            hbm_bytes_per_s=819e9,
            ici_axes=2,
            ici_link_bytes_per_s=45e9,
            dcn_bytes_per_s=3.125e9,  # 2 x 100 Gbit/s a host of 8
            clock_hz=1.5e9,
            pallas_attention_efficiency=0.5,
            vmem_bytes_per_core=128 * 2**20,
            host_ram_bytes=64 * GIB,  # 512 GiB a host of 8
            chips_per_host=8,
        ),
        Chip(
            name="v5p",
            device_kinds=("TPU v5", "TPU v5p"),
            topology_family="v5p",
            accelerator_prefix="v5p",
            devices_per_chip=1,
            cores=2,
            name_counts_cores=True,
            peak_flops={"bf16": 459e12, "int8": 918e12, "fp8": 459e12},
            hbm_bytes=96 * GIB,  # published as 95; the compiler gives 95.73
            usable_hbm_bytes=int(95.73 * GIB),
            hbm_bytes_per_s=2765e9,
            ici_axes=3,
            ici_link_bytes_per_s=90e9,
            dcn_bytes_per_s=6.25e9,
            clock_hz=1.75e9,
            pallas_attention_efficiency=0.5,
            vmem_bytes_per_core=64 * 2**20,
            host_ram_bytes=int(448e9 / 4),
            chips_per_host=4,
        ),
        Chip(
            name="v6e",
            device_kinds=("TPU v6 lite", "TPU v6e"),
            topology_family="v6e",
            accelerator_prefix="v6e",
            devices_per_chip=1,
            cores=1,
            name_counts_cores=False,
            peak_flops={"bf16": 918e12, "int8": 1836e12, "fp8": 918e12},
            hbm_bytes=32 * GIB,
            usable_hbm_bytes=int(31.24 * GIB),
            hbm_bytes_per_s=1638e9,
            ici_axes=2,
            ici_link_bytes_per_s=90e9,
            dcn_bytes_per_s=12.5e9,
            clock_hz=1.75e9,
            pallas_attention_efficiency=0.25,
            vmem_bytes_per_core=128 * 2**20,
            host_ram_bytes=int(720e9 / 4),
            chips_per_host=8,
            pcie_bytes_per_s=32e9,
        ),
        Chip(
            name="tpu7x",
            device_kinds=("TPU7x",),
            topology_family="tpu7x",
            accelerator_prefix="tpu7x",
            devices_per_chip=2,
            cores=2,
            name_counts_cores=True,
            peak_flops={"bf16": 2307e12, "fp8": 4614e12},
            hbm_bytes=192 * GIB,
            usable_hbm_bytes=int(2 * 94.74 * GIB),
            hbm_bytes_per_s=7380e9,
            ici_axes=3,
            ici_link_bytes_per_s=100e9,
            dcn_bytes_per_s=12.5e9,
            clock_hz=2.2e9,
            pallas_attention_efficiency=0.25,
            vmem_bytes_per_core=64 * 2**20,
            host_ram_bytes=int(960e9 / 4),
            chips_per_host=4,
        ),
    )
}

# Dense bfloat16 FLOP/s of one JAX device of kinds that nothing is planned for. On TPU v2 and v3 a
# device is one of a chip's two cores. Keys are the start of `device_kind`.
OTHER_PEAK_FLOPS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4 lite": 138e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that a JAX device of this kind is (part of), or None for anything else."""
    row = _longest_prefix(device_kind)
    return row if isinstance(row, Chip) else None


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of one JAX device, or None when it isn't known, as for any CPU."""
    row = _longest_prefix(device_kind)
    return row.device_peak_flops() if isinstance(row, Chip) else row


def _longest_prefix(device_kind: str) -> Chip | float | None:
    rows: dict[str, Chip | float] = dict(OTHER_PEAK_FLOPS)
    rows.update({kind: chip for chip in CHIPS.values() for kind in chip.device_kinds})
    # Longest first: a "TPU v5 lite" isn't a "TPU v5".
    for kind in sorted(rows, key=len, reverse=True):
        if device_kind.lower().startswith(kind.lower()):
            return rows[kind]
    return None


# Slices by name: what Cloud lists, by chips, as the shape of the torus.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x4x12", "4x8x8", "4x8x12"),
    *("8x8x8", "8x8x12", "8x8x16", "8x12x16", "8x16x16", "16x16x16", "16x16x24"),
)
TOPOLOGIES: dict[str, tuple[str, ...]] = {
    "v4": tuple(shape for shape in _CUBES if shape not in ("16x16x16", "16x16x24")),
    "v5e": _FLAT,
    "v5p": _CUBES,
    "v6e": _FLAT,
    "tpu7x": (*_CUBES, "16x24x24"),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice of `chip`s joined by ICI: the shape of its (mesh or torus), as in `4x4`."""

    chip: Chip
    topology: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Chips along each axis."""
        return tuple(int(size) for size in self.topology.split("x"))

    @property
    def num_chips(self) -> int:
        """Chips in it."""
        return math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        """JAX devices in it."""
        return self.num_chips * self.chip.devices_per_chip

    @property
    def topology_name(self) -> str:
        """What `jax.experimental.topologies.get_topology_desc` calls it, as in `v5e:4x4`."""
        return f"{self.chip.topology_family}:{self.topology}"

    @property
    def name(self) -> str:
        """Chip and size in the family's own count (cores or chips), as in `v5e-16`."""
        return f"{self.chip.name}-{self._size}"

    @property
    def accelerator_type(self) -> str:
        """Cloud's name, as in `v5litepod-16`."""
        return f"{self.chip.accelerator_prefix}-{self._size}"

    @property
    def num_hosts(self) -> int:
        """VMs: one where all chips are in one host, else VMs of 4 chips."""
        if self.num_chips <= self.chip.chips_per_host:
            return 1
        return math.ceil(self.num_chips / 4)

    @property
    def _size(self) -> int:
        return self.num_chips * (self.chip.cores if self.chip.name_counts_cores else 1)


SLICES: dict[str, Slice] = {
    part.name: part
    for family, shapes in TOPOLOGIES.items()
    for part in (Slice(CHIPS[family], shape) for shape in shapes)
}


def wraps(part: Slice) -> tuple[bool, ...]:
    """For each axis of the slice, whether its ends are joined.

    2D chips: only a full axis of 16. 3D chips: axes that are multiples of 4.
    """
    full = 16 if part.chip.ici_axes == 2 else 4
    return tuple(size % full == 0 for size in part.shape)


def find_slice(text: str) -> Slice:
    """The slice that `v5e:4x4`, `v5e-16`, `v5litepod-16`, `v5p-8` (cores) or `tpu7x-128` names.

    Raises:
      ConfigError: no such chip, size or shape; names the nearest.
    """
    family, separator, size = text.strip().lower().partition(":" if ":" in text else "-")
    chip = _chip_named(family, text)
    if separator == ":":
        return _slice_of_shape(chip, size)
    found = SLICES.get(f"{chip.name}-{size}")
    if found is None:
        names = [part.name for part in SLICES.values() if part.chip is chip]
        raise ConfigError(f"no slice is called {text!r}{_nearest_size(chip.name, size, names)}")
    return found


def _chip_named(family: str, text: str) -> Chip:
    aliases = {"v5litepod": "v5e", "v5": "v5p", "v7x": "tpu7x", "trillium": "v6e"}
    name = aliases.get(family, family)
    if name not in CHIPS:
        known = [*CHIPS, *aliases]
        raise ConfigError(f"no TPU chip is called {family!r}, in {text!r}{nearest(family, known)}")
    return CHIPS[name]


def _slice_of_shape(chip: Chip, topology: str) -> Slice:
    # From a cube of 4 on, 3D slices come in any number of such cubes; the rest is as listed.
    cubes = chip.ici_axes == 3 and re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", topology)
    if cubes and all(int(size) % 4 == 0 for size in topology.split("x")):
        return Slice(chip, topology)
    if topology not in TOPOLOGIES[chip.name]:
        known = nearest(topology, TOPOLOGIES[chip.name])
        raise ConfigError(f"{chip.name} has no slice of shape {topology!r}{known}")
    return Slice(chip, topology)


def _nearest_size(chip: str, size: str, names: list[str]) -> str:
    if not size.isdigit():
        return nearest(f"{chip}-{size}", names)
    # By number, not by letters: 24 is nearer to 16 than to 2048.
    close = min(names, key=lambda name: abs(math.log2(int(name.split("-")[1]) / max(int(size), 1))))
    return f" (did you mean '{close}'?)"
