"""A run's peak memory and step time by formula: in microseconds, so that thousands can be tried.

Good enough to throw out what can't fit and what is slow; what is left is compiled. The memory
model's coefficients are those that bring it within a tenth of the compiler's peak over the stored
plans. All figures are a JAX device's.

Letters: T tokens of a microbatch on a device, D width, F MLP width, L layers, V vocabulary,
P parameters.
"""

import dataclasses
import math

from llama_jax.config.hardware import Slice
from llama_jax.config.model import ModelConfig
from llama_jax.config.run import (
    AdafactorConfig,
    AdamWConfig,
    CheckpointName,
    LionConfig,
    MuonConfig,
    RunConfig,
)
from llama_jax.models.accounting import (
    flops_per_token,
    matmul_params,
    param_count,
    param_shapes,
)
from llama_jax.models.lora import LORA_A, LORA_B, trainable_paths
from llama_jax.models.remat import offloaded_names, saved_names, token_widths
from llama_jax.planning.estimate import ici_bytes_per_s
from llama_jax.sharding.mesh import AXES, axis_sizes

# Share of peak that the matmuls of a compiled step reach, by the compiler's own cycles.
MATMUL_EFFICIENCY = 0.9
# Of the last dim of a tile in HBM.
LANES = 128


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the mesh, and of a microbatch on one device."""

    data: int
    fsdp: int
    context: int
    tensor: int
    microbatches: int
    tokens: int  # T
    slices: int

    @property
    def state_shards(self) -> int:
        """Over how many devices parameters are split."""
        return self.fsdp * self.tensor


@dataclasses.dataclass(frozen=True)
class MemoryModel:
    """Bytes at the peak, by what takes them.

    `working` is the most of three moments: a layer's backward pass beside the gradients made so
    far; the loss, when there are none yet; and an update whose moments come from the host.
    """

    params: float
    optimizer: float
    gradients: float  # the sum over the microbatches before
    saved_activations: float
    working: float

    @property
    def peak_bytes(self) -> float:
        """All of it."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class TimeModel:
    """Seconds a step by bound; `estimate` adds up compute and HBM, and hides what it can hide."""

    compute: float
    hbm: float
    ici: float
    dcn: float
    host: float

    @property
    def estimate(self) -> float:
        """What the search ranks by before compiling."""
        return max(self.compute + self.hbm, self.ici, self.dcn, self.host)


def sizes_of(config: RunConfig, num_devices: int, slices: int = 1) -> Sizes:
    """Mesh and microbatch of a run on so many devices.

    Raises:
      ConfigError: the mesh doesn't multiply to the devices.
    """
    mesh = dict(zip(AXES, axis_sizes(config.mesh, num_devices), strict=True))
    shards = mesh["data"] * mesh["fsdp"] * mesh["context"]
    microbatches = config.training.microbatches
    tokens = config.data.batch_size * config.data.seq_len / shards / microbatches
    return Sizes(**mesh, microbatches=microbatches, tokens=math.ceil(tokens), slices=slices)


def memory_model(config: RunConfig, sizes: Sizes) -> MemoryModel:
    """Peak of the step, without what is kept in the host's memory."""
    model, execution = config.model, config.execution
    local_params = param_count(model) / sizes.state_shards
    param_bytes = _bytes(execution.param_dtype)
    trained, kept, grad_bytes = local_params, 0.0, _bytes(execution.compute_dtype)
    if config.adapter is not None:
        # Adapters and their gradients in float32, beside weights that lie in the compute dtype.
        trained, param_bytes, grad_bytes = _local_adapter(config, sizes), grad_bytes, 4
        kept = 4 * trained
    # Those of matrices stay in the compute dtype; summed over microbatches they are float32.
    made = grad_bytes * trained
    in_backward = made + _layer_bytes(config, sizes) + _cast_bytes(config, sizes)
    return MemoryModel(
        params=local_params * param_bytes + kept,
        optimizer=_moment_bytes(config, trained),
        gradients=4 * trained if sizes.microbatches > 1 else 0.0,
        saved_activations=_saved_bytes(config, sizes),
        working=max(in_backward, _loss_bytes(config, sizes), _update_bytes(config, sizes)),
    )


def time_model(config: RunConfig, sizes: Sizes, slice_: Slice) -> TimeModel:
    """Step time by bound."""
    chip = slice_.chip
    peak = chip.device_peak_flops() or math.inf
    matmul, attention = _executed_flops(config, sizes)
    gathered = _gathered_bytes(config, sizes)
    between, within = _axis_bytes(config, sizes, gathered)
    return TimeModel(
        compute=matmul / peak / MATMUL_EFFICIENCY
        + attention / peak / chip.pallas_attention_efficiency,
        hbm=_elementwise_bytes(config, sizes) / chip.device_hbm_bytes_per_s,
        ici=within / ici_bytes_per_s(slice_),
        dcn=between / chip.dcn_bytes_per_s * chip.devices_per_chip,
        host=_host_bytes(config, sizes) / chip.pcie_bytes_per_s * chip.devices_per_chip,
    )


def _moment_bytes(config: RunConfig, local_params: float) -> float:
    """Moments on the device."""
    optimizer = config.optimizer
    if isinstance(optimizer, AdafactorConfig):
        return 0.0
    if isinstance(optimizer, LionConfig | MuonConfig):
        return 4 * local_params
    return 0.0 if optimizer.offload_moments else 2 * _bytes(optimizer.moments) * local_params


def _local_adapter(config: RunConfig, sizes: Sizes) -> float:
    """Parameters of adapters on a device: their sides of the model's width are split over fsdp."""
    shapes = param_shapes(config.model, config.adapter)
    total = 0.0
    for path in trainable_paths(shapes):
        projection = path[-1].removesuffix(LORA_A).removesuffix(LORA_B)
        reads_width = projection not in ("o_proj", "down_proj")
        split = sizes.fsdp if path[-1].endswith(LORA_A if reads_width else LORA_B) else sizes.tensor
        total += math.prod(shapes[path]) / split
    return total


def _host_bytes(config: RunConfig, sizes: Sizes) -> float:
    """What goes to the host's memory and comes back, a step."""
    model, optimizer, widths = config.model, config.optimizer, token_widths(config.model)
    offloaded = sum(widths[name] for name in offloaded_names(config.execution)) / sizes.tensor
    tokens = sizes.tokens * sizes.microbatches * model.num_layers
    activations = tokens * offloaded * _bytes(config.execution.compute_dtype)
    moments = 0.0
    if isinstance(optimizer, AdamWConfig) and optimizer.offload_moments:
        moments = 2 * _bytes(optimizer.moments) * param_count(model) / sizes.state_shards
    return 2 * (activations + moments)


def _saved_bytes(config: RunConfig, sizes: Sizes) -> float:
    """What all layers keep on the device for their backward pass."""
    execution, model = config.execution, config.model
    widths = _stored_widths(model)
    kept = set(saved_names(execution)) - set(offloaded_names(execution))
    elements = sum(widths[name] for name in kept) / sizes.tensor
    softmax_stats = 4 * model.num_heads / sizes.tensor if "attention" in kept else 0
    per_token = elements * _bytes(execution.compute_dtype) + softmax_stats
    return model.num_layers * sizes.tokens * per_token


def _stored_widths(model: ModelConfig) -> dict[CheckpointName, int]:
    """Elements a token and layer as they lie in HBM: heads are padded to the lanes of a tile."""
    padding = -(-model.head_dim // LANES) * LANES / model.head_dim
    return {
        name: round(width * padding) if name in ("q", "k", "v") else width
        for name, width in token_widths(model).items()
    }


def _cast_bytes(config: RunConfig, sizes: Sizes) -> float:
    """Weights in the compute dtype.

    Where they aren't gathered the compiler casts all layers' once, before the loop over layers.
    """
    execution = config.execution
    is_cast = config.adapter is None and execution.param_dtype != execution.compute_dtype
    if sizes.fsdp > 1 or not is_cast:
        return 0.0
    return param_count(config.model) / sizes.tensor * _bytes(execution.compute_dtype)


def _layer_bytes(config: RunConfig, sizes: Sizes) -> float:
    """One layer's backward pass: weights, their gradients, and its activations and their own."""
    model, itemsize = config.model, _bytes(config.execution.compute_dtype)
    weights = _layer_params(model) / sizes.tensor
    widths = token_widths(model)
    activations = 1.6 * sum(widths.values()) / sizes.tensor * sizes.tokens * itemsize
    gathered_kv = 0.0
    if sizes.context > 1:
        keys = 2 * (widths["k"] + widths["v"]) / min(sizes.tensor, model.num_kv_heads)
        gathered_kv = keys * sizes.tokens * sizes.context * itemsize
    # Not all are gathered at once, nor all their gradients waiting to be scattered. Some programs
    # still hold the head's whole gradient then, some don't.
    head = 0.0 if _head_is_split(config, sizes) else 0.2 * 4 * model.vocab_size * model.embed_dim
    return 2 * weights * itemsize + activations + gathered_kv + head / sizes.tensor


def _loss_bytes(config: RunConfig, sizes: Sizes) -> float:
    """Head, its float32 gradient before it is scattered, hidden states and the logits of a chunk.

    On a small slice each device has a part of the head instead, and all its fsdp group's tokens.
    """
    model = config.model
    columns = model.vocab_size / sizes.tensor
    ways = sizes.fsdp if _head_is_split(config, sizes) else 1
    chunk = min(config.execution.loss_chunk_size, sizes.tokens)
    itemsize = _bytes(config.execution.compute_dtype)
    # A frozen head has no gradient, and where it isn't gathered it is read as it lies.
    gathered = itemsize if config.adapter is None or sizes.fsdp > 1 else 0
    gradient = 4 if config.adapter is None else 0
    head = columns / ways * model.embed_dim * (gathered + gradient)
    states = sizes.tokens * ways * model.embed_dim * itemsize
    return head + states + 2 * 4 * chunk * columns


def _head_is_split(config: RunConfig, sizes: Sizes) -> bool:
    """Whether a loss gathers tokens over fsdp instead of the head; as `Llama.for_loss` decides."""
    return sizes.tokens * sizes.fsdp <= 2 * config.model.vocab_size / sizes.tensor


def _update_bytes(config: RunConfig, sizes: Sizes) -> float:
    """float32 updates, and gradients that weren't before, where moments pass through by layers."""
    optimizer = config.optimizer
    if not (isinstance(optimizer, AdamWConfig) and optimizer.offload_moments):
        return 0.0
    copies = 2 if sizes.microbatches == 1 else 1
    return copies * 4 * param_count(config.model) / sizes.state_shards


def _executed_flops(config: RunConfig, sizes: Sizes) -> tuple[float, float]:
    """FLOPs of matmuls, and of attention, with what remat does again; a step."""
    model = config.model
    tokens = sizes.tokens * sizes.microbatches / sizes.tensor
    matmul = 6.0 * matmul_params(model)
    attention = flops_per_token(model, config.data.seq_len) - matmul
    again, attention_again = _recomputed(config)
    # Of a fused backward kernel's 5 products the model counts 4: the scores are made again.
    attention *= (1 + attention_again) / 3 + 5 / 6
    return tokens * (matmul + again), tokens * attention


def _recomputed(config: RunConfig) -> tuple[float, float]:
    """Matmul FLOPs a token done again in the backward pass, and attention's forward passes."""
    execution, model = config.execution, config.model
    if execution.remat == "none":
        return 0.0, 0.0
    widths = token_widths(model)
    kept = set(saved_names(execution)) | set(offloaded_names(execution))
    width, queries = model.embed_dim, widths["q"]
    products = {
        "q": width * queries, "k": width * widths["k"], "v": width * widths["v"],
        "o_proj": queries * width, "gate_proj": width * model.mlp_dim,
        "up_proj": width * model.mlp_dim,
    }  # fmt: skip
    again = sum(size for name, size in products.items() if name not in kept)
    return 2.0 * model.num_layers * again, 0.0 if "attention" in kept else 1.0


def _gathered_bytes(config: RunConfig, sizes: Sizes) -> float:
    """Weights that a device receives in one pass over the layers."""
    if sizes.fsdp == 1:
        return 0.0
    whole = param_count(config.model) / sizes.tensor * _bytes(config.execution.compute_dtype)
    return whole * (sizes.fsdp - 1) / sizes.fsdp


def _axis_bytes(config: RunConfig, sizes: Sizes, gathered: float) -> tuple[float, float]:
    """Bytes over DCN and over ICI, a device and step."""
    model, itemsize = config.model, _bytes(config.execution.compute_dtype)
    local_gradients = 4 * param_count(config.model) / sizes.state_shards
    replicas_within = sizes.data // sizes.slices
    between = 2 * local_gradients if sizes.slices > 1 else 0.0
    within = 2 * local_gradients if replicas_within > 1 else 0.0
    # Weights for the forward and for the backward pass, gradients reduced in full: 2 + 2.
    within += sizes.microbatches * 4 * gathered
    stream = sizes.tokens * model.embed_dim * itemsize
    if sizes.tensor > 1:
        within += sizes.microbatches * model.num_layers * 6 * stream
    if sizes.context > 1:
        keys = 2 * token_widths(model)["k"] / sizes.tensor * sizes.tokens * sizes.context * itemsize
        within += sizes.microbatches * model.num_layers * 3 * keys
    return between, within


def _elementwise_bytes(config: RunConfig, sizes: Sizes) -> float:
    """HBM traffic outside of matmuls: norms, rotations, activations, casts and the update."""
    model, itemsize = config.model, _bytes(config.execution.compute_dtype)
    widths = token_widths(model)
    per_token = 6 * sum(widths.values()) / sizes.tensor * itemsize
    activations = sizes.microbatches * model.num_layers * sizes.tokens * per_token
    local_params = param_count(model) / sizes.state_shards
    casts = sizes.microbatches * 2 * (4 + itemsize) * local_params
    update = (8 + 8 + 4) * local_params + 2 * _moment_bytes(config, local_params)
    return activations + casts + update


def _layer_params(model: ModelConfig) -> float:
    return (matmul_params(model) - model.vocab_size * model.embed_dim) / model.num_layers


def _bytes(dtype: str) -> int:
    return {"float32": 4, "bfloat16": 2}[dtype]
