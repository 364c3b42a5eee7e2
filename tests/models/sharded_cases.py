"""The one table of ways to spread a step over eight devices: each equals one device, each compiles
for TPUs."""

from typing import Literal, NamedTuple

from llama_jax.config.run import MeshConfig


class Case(NamedTuple):
    """A mesh, how its context axis meets keys, and the slice that it stands for on TPUs."""

    mesh: MeshConfig
    context: Literal["gather", "ring"] = "gather"
    topology: str = "v5e:2x4"
    num_slices: int = 1


CASES = {
    "data 8": Case(MeshConfig(data=8, fsdp=1)),
    "data 2, a slice each": Case(MeshConfig(data=2, fsdp=4), topology="v5e:2x2", num_slices=2),
    "fsdp 8": Case(MeshConfig(fsdp=8)),
    "tensor 2": Case(MeshConfig(fsdp=4, tensor=2)),
    "tensor 4, over the 2 kv heads": Case(MeshConfig(fsdp=2, tensor=4), topology="v5p:2x2x2"),
    "tensor 8, over the 2 kv heads": Case(MeshConfig(fsdp=1, tensor=8)),
    "context 8": Case(MeshConfig(fsdp=1, context=8)),
    "context 8, ring": Case(MeshConfig(fsdp=1, context=8), "ring"),
    "fsdp 4 x context 2": Case(MeshConfig(fsdp=4, context=2)),
    "fsdp 2 x context 4, ring": Case(MeshConfig(fsdp=2, context=4), "ring", "v5p:2x2x2"),
    "fsdp 2 x context 2 x tensor 2": Case(MeshConfig(fsdp=2, context=2, tensor=2)),
    "data 2 x context 2 x tensor 2": Case(
        MeshConfig(data=2, fsdp=1, context=2, tensor=2), topology="v5e:2x2", num_slices=2
    ),
    "data 2 x context 2 x tensor 2, ring": Case(
        MeshConfig(data=2, fsdp=1, context=2, tensor=2), "ring", "v5e:2x2", 2
    ),
}
