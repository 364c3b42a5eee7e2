"""One run: the tables of a run's TOML file. What each table builds is its package's business."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Literal

# The `data` table's parts under their old address too: most of the package takes all from here.
from llama_jax.config.data import ConversationsConfig as ConversationsConfig
from llama_jax.config.data import DataConfig as DataConfig
from llama_jax.config.data import PreferencesConfig as PreferencesConfig
from llama_jax.config.data import SourceConfig as SourceConfig
from llama_jax.config.data import TextConfig as TextConfig
from llama_jax.config.hardware import find_slice
from llama_jax.config.loading import (
    ConfigError,
    Fraction,
    NotNegative,
    Positive,
    Range,
    check_ranges,
)
from llama_jax.config.model import ModelConfig
from llama_jax.config.post_training import (
    AdapterConfig,
    DistillConfig,
    DPOConfig,
    InitConfig,
    RewardConfig,
)

DType = Literal["float32", "bfloat16"]
FlagValue = str | bool | int | float
MatmulPrecision = Literal["default", "int8", "fp8"]
# Tensors of a layer that its backward pass reads, in the order in which they are made. q, k and v
# are what attention reads: rotated. `swiglu` is what the down projection reads.
CheckpointName = Literal[
    "layer_input",
    "attn_norm",
    "q",
    "k",
    "v",
    "attention",
    "o_proj",
    "mlp_norm",
    "gate_proj",
    "up_proj",
    "swiglu",
]


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
    """How the network is executed; nothing here changes what it computes, up to rounding."""

    # Of what is trained; weights that are only read (under adapters, a reference, a teacher) lie in
    # the compute dtype, and adapters in float32.
    param_dtype: DType = "float32"
    compute_dtype: DType = "bfloat16"
    # `auto` takes the best one for the device and length; see llama_jax.kernels.
    attention: Literal["auto", "reference", "blockwise", "splash", "cudnn"] = "auto"
    # Before the first step, compare the backend with `reference` on one packed batch.
    check_attention: bool = True
    # With mesh.context > 1, how queries meet the keys that other devices hold: all are gathered in
    # each layer, or they go round from device to device, which holds one device's at a time.
    context_attention: Literal["gather", "ring"] = "gather"
    # What a layer keeps for its backward pass, from all to its input alone; llama_jax.models.remat
    # says what each keeps. `dots` recomputes so little that it is the default.
    remat: Literal["none", "dots", "block", "attention", "full"] = "dots"
    # Tensors kept beside those of `remat`, and tensors kept in the host's memory instead.
    remat_save: tuple[CheckpointName, ...] = ()
    remat_offload: tuple[CheckpointName, ...] = ()
    # Products of the layers' matrices, forward and backward: operands in the compute dtype, or
    # rounded to 8 bits with a scale a row and column (needs the extra `quant`). Attention's own
    # products, embedding and head stay in the compute dtype.
    matmul_precision: MatmulPrecision = "default"
    scan_layers: bool = True
    # Tokens a chunk of the cross entropy on each device; bounds the float32 logits held at once.
    loss_chunk_size: Annotated[int, Positive] = 1024

    def __post_init__(self) -> None:
        check_ranges(self)
        for key in ("remat_save", "remat_offload"):
            if self.remat == "none" and getattr(self, key):
                raise ConfigError("has no meaning for remat 'none', which keeps all", key=key)
        both = sorted(set(self.remat_save) & set(self.remat_offload))
        if both:
            raise ConfigError(f"'{both[0]}' is in remat_save too", key="remat_offload")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, all the devices that are left."""

    data: Annotated[int, Range(at_least=-1)] = 1
    fsdp: Annotated[int, Range(at_least=-1)] = -1
    context: Annotated[int, Range(at_least=-1)] = 1
    tensor: Annotated[int, Range(at_least=-1)] = 1

    def __post_init__(self) -> None:
        check_ranges(self)
        sizes = dataclasses.asdict(self)
        zero = [name for name, size in sizes.items() if size == 0]
        if zero:
            raise ConfigError("0 devices; use 1, or -1 for all that are left", key=zero[0])
        if list(sizes.values()).count(-1) > 1:
            raise ConfigError(f"at most one axis may be -1, got {sizes}", key="fsdp")


@dataclasses.dataclass(frozen=True)
class TrainedTokenizer:
    """A vocabulary trained on the run's own text."""

    vocab_size: Annotated[int, Range(at_least=272)]  # 256 bytes, merges or pieces, special tokens
    kind: Literal["train"] = "train"
    # Llama 3's: byte-level BPE with its split pattern; or Llama 2's: BPE with byte fallback.
    model: Literal["tiktoken", "sentencepiece"] = "tiktoken"

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True)
class TokenizerFile:
    """An existing tokenizer: `tokenizer.model`, `tokenizer.json`, a GGUF file or a folder."""

    path: str
    kind: Literal["file"] = "file"


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """One token a byte, plus special tokens."""

    kind: Literal["byte"] = "byte"


@dataclasses.dataclass(frozen=True)
class NextTokenConfig:
    """Next-token cross entropy, with `z_loss * log(Z)^2` added (PaLM, arXiv 2204.02311)."""

    kind: Literal["next_token"] = "next_token"
    z_loss: Annotated[float, NotNegative] = 0.0

    def __post_init__(self) -> None:
        check_ranges(self)


ObjectiveConfig = NextTokenConfig | RewardConfig | DPOConfig | DistillConfig


@dataclasses.dataclass(frozen=True)
class AdamWConfig:
    """AdamW with the Llama defaults; decay on matrices only, never on norm scales."""

    kind: Literal["adamw"] = "adamw"
    b1: Annotated[float, Fraction] = 0.9
    b2: Annotated[float, Fraction] = 0.95
    eps: Annotated[float, Positive] = 1e-8
    weight_decay: Annotated[float, NotNegative] = 0.1
    # How the moments are stored; bfloat16 rounds stochastically and halves them.
    moments: DType = "float32"
    # Keep the matrices' moments in the host's memory, streamed through the update layer by layer.
    offload_moments: bool = False

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True)
class AdafactorConfig:
    """Adafactor with factored second moments."""

    kind: Literal["adafactor"] = "adafactor"
    decay_rate: Annotated[float, Fraction] = 0.8
    weight_decay: Annotated[float, NotNegative] = 0.0
    min_dim_size_to_factor: Annotated[int, Positive] = 128

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True)
class LionConfig:
    """Lion (arXiv 2302.06675)."""

    kind: Literal["lion"] = "lion"
    b1: Annotated[float, Fraction] = 0.9
    b2: Annotated[float, Fraction] = 0.99
    weight_decay: Annotated[float, NotNegative] = 0.1

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True)
class MuonConfig:
    """Muon on the layers' matrices, AdamW on embedding, head and norms."""

    kind: Literal["muon"] = "muon"
    beta: Annotated[float, Fraction] = 0.95
    ns_steps: Annotated[int, Positive] = 5
    weight_decay: Annotated[float, NotNegative] = 0.1
    # Learning rate of the AdamW part, relative to the schedule's.
    adam_scale: Annotated[float, Positive] = 1.0
    adam_b1: Annotated[float, Fraction] = 0.9
    adam_b2: Annotated[float, Fraction] = 0.95

    def __post_init__(self) -> None:
        check_ranges(self)


OptimizerConfig = AdamWConfig | AdafactorConfig | LionConfig | MuonConfig


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate by optimizer step, counted from 1: step `warmup_steps` is the first at `peak`.

    cosine, linear: from peak to `end_fraction * peak` at the last step. constant: peak.
    warmup_stable_decay: peak until the last `decay_steps`, then linear to the final fraction.
    anneal: from peak at the first step linear to 0 at the last, no warm-up.
    """

    peak: Annotated[float, Positive]
    kind: Literal["cosine", "linear", "constant", "warmup_stable_decay", "anneal"] = "cosine"
    warmup_steps: Annotated[int, NotNegative] = 0
    decay_steps: Annotated[int, NotNegative] = 0  # warmup_stable_decay only
    # Of the peak; None is the Llama papers' 0.1. Has no meaning where the end is given by `kind`.
    final_fraction: Annotated[float, Fraction] | None = None

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.decay_steps and self.kind != "warmup_stable_decay":
            raise ConfigError(f"has no meaning for kind '{self.kind}'", key="decay_steps")
        if self.warmup_steps and self.kind == "anneal":
            raise ConfigError("annealing has no warm-up", key="warmup_steps")
        if self.final_fraction is not None and self.kind in ("constant", "anneal"):
            raise ConfigError(f"has no meaning for kind '{self.kind}'", key="final_fraction")

    @property
    def end_fraction(self) -> float:
        """The last rate of a decaying kind, as a share of the peak."""
        return 0.1 if self.final_fraction is None else self.final_fraction


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The step and the loop."""

    steps: Annotated[int, Positive]
    microbatches: Annotated[int, Positive] = 1
    clip_norm: Annotated[float, Positive] | None = 1.0
    # Keep a running average of the weights, `d * average + (1 - d) * weights` after each update
    # (less at first: (1 + n) / (10 + n) in update n). Evaluations, samples and whoever reads the
    # run's checkpoints then get the average.
    ema_decay: Annotated[float, Fraction] | None = None
    # Steps in a row with a non-finite loss or gradient after which the run stops.
    max_skipped_steps: Annotated[int, Positive] = 10
    eval_every: Annotated[int, Positive] | None = None  # steps; None: at the end only
    eval_batches: Annotated[int, Positive] | None = None  # None: the whole held-out part
    sample_prompts: tuple[str, ...] = ()
    sample_tokens: Annotated[int, Positive] = 64

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save; what to keep: the last ones, every n-th, the best by held-out loss."""

    every: Annotated[int, Positive] = 1000  # steps; the last step is always saved
    keep_last: Annotated[int, Positive] = 2
    keep_every: Annotated[int, Positive] | None = None
    keep_best: bool = True

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True)
class MetricsConfig:
    """Who is told. `metrics.jsonl` in the run directory is always written, an object a step."""

    tensorboard: bool = True
    wandb_project: str | None = None
    progress: bool = True


@dataclasses.dataclass(frozen=True)
class HardwareConfig:
    """What a run is meant for: `plan` compiles for it, `train` says so where the devices differ."""

    slice: str  # a TPU slice by name or topology: "v5e-16", "v5litepod-16", "v5p:4x4x4"
    slices: Annotated[int, Positive] = 1  # slices joined over the data centre's network

    def __post_init__(self) -> None:
        check_ranges(self)
        try:
            find_slice(self.slice)
        except ConfigError as error:
            raise error.within("slice", "") from None


@dataclasses.dataclass(frozen=True)
class CompilerConfig:
    """XLA and libtpu flags of this run, over those of the chip's table.

    The table is `llama_jax.training.compiler_flags`; a value of "default" leaves a row of it out.
    Only TPUs have flags here; another machine says that it takes none.
    """

    flags: Mapping[str, FlagValue] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in self.flags:
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                raise ConfigError("not a flag's name; leave the dashes out", key=f"flags.{name}")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run."""

    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    schedule: ScheduleConfig
    tokenizer: ByteTokenizer | TokenizerFile | TrainedTokenizer
    optimizer: OptimizerConfig = AdamWConfig()
    objective: ObjectiveConfig = NextTokenConfig()
    # The weights to start from; None draws them.
    init: InitConfig | None = None
    # Train low-rank adapters beside frozen weights, not the weights themselves.
    adapter: AdapterConfig | None = None
    execution: ExecutionConfig = ExecutionConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    compiler: CompilerConfig = CompilerConfig()
    hardware: HardwareConfig | None = None
    seed: Annotated[int, Range(at_least=0, at_most=2**32 - 1)] = 0

    def __post_init__(self) -> None:
        check_ranges(self)
        self._check_lengths()
        self._check_schedule()
        self._check_objective()

    def _check_lengths(self) -> None:
        data, model = self.data, self.model
        if data.seq_len > model.max_seq_len:
            raise ConfigError(
                f"{data.seq_len} is longer than model.max_seq_len, {model.max_seq_len}",
                key="data.seq_len",
            )
        if data.batch_size % self.training.microbatches:
            raise ConfigError(
                f"{self.training.microbatches} does not divide data.batch_size, {data.batch_size}",
                key="training.microbatches",
            )

    def _check_objective(self) -> None:
        kind, held = self.objective.kind, self.data.kind
        reads = "preferences" if kind in ("reward", "dpo") else "text or conversations"
        if (held == "preferences") != (reads == "preferences"):
            raise ConfigError(f"'{kind}' reads {reads}; data.sources hold {held}", key="objective")
        if self.adapter is not None and self.init is None:
            raise ConfigError(
                "adapters need weights to stand beside; give init.path", key="adapter"
            )
        self._check_continued_adapter()
        self._check_layers()
        head = "scalar" if kind == "reward" else "vocab"
        if self.model.head != head:
            raise ConfigError(f"objective '{kind}' needs '{head}'", key="model.head")
        if self.training.sample_prompts and head == "scalar":
            raise ConfigError("a reward model writes nothing", key="training.sample_prompts")
        if held == "preferences":
            self._check_mismatched()

    def _check_mismatched(self) -> None:
        is_kto = isinstance(self.objective, DPOConfig) and self.objective.loss == "kto"
        for part in ("sources", "held_out"):
            for source in getattr(self.data, part):
                if source.preferences and source.preferences.mismatched != is_kto:
                    asks = "is false, but" if is_kto else "is true, which only"
                    end = "needs it of every source" if is_kto else "reads"
                    raise ConfigError(
                        f"mismatched of '{source.name}' {asks} loss 'kto' {end}", key=f"data.{part}"
                    )

    def _check_continued_adapter(self) -> None:
        if self.init is not None and self.init.adapter is not None and self.adapter is None:
            raise ConfigError("give the table 'adapter' too: what trains", key="init.adapter")

    def _check_layers(self) -> None:
        layers = self.init.layers if self.init else None
        if layers is None:
            return
        if self.adapter is not None:
            raise ConfigError("adapters stand beside a whole checkpoint", key="init.layers")
        if len(layers) != self.model.num_layers:
            raise ConfigError(
                f"{len(layers)} layers; model.num_layers is {self.model.num_layers}",
                key="init.layers",
            )

    def _check_schedule(self) -> None:
        schedule, steps = self.schedule, self.training.steps
        used = schedule.warmup_steps + schedule.decay_steps
        if used > steps:
            raise ConfigError(
                f"warm-up and decay take {used} steps, training.steps is {steps}",
                key="schedule.warmup_steps",
            )
