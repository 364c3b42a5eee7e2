"""The loss of any checkpoint on what a run holds out: by its objective, data and evaluation step.

For choosing among checkpoints that are trained. A DPO run's reference is the model that the run
starts from, held beside the checkpoint whatever `objective.reference` says.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from llama_jax.config.loading import ConfigError
from llama_jax.config.run import DistillConfig, DPOConfig, RunConfig, TrainedTokenizer
from llama_jax.data.sources import open_tokenizer
from llama_jax.interchange.opening import open_source
from llama_jax.interchange.source import Source
from llama_jax.interchange.starting import load_params_into
from llama_jax.sharding.mesh import make_mesh
from llama_jax.tokenizers import Tokenizer
from llama_jax.training.assembly import assemble, checked_attention
from llama_jax.training.held_out import evaluate_params
from llama_jax.training.inputs import Inputs, Say, held_out_passes, open_part
from llama_jax.training.starting import starting_params
from llama_jax.training.teacher import check_teacher


@contextlib.contextmanager
def opened_held_out_loss(
    config: RunConfig, checkpoint: str | Path, *, own_tokenizer: bool = True, say: Say = print
) -> Iterator[Callable[[Source], float]]:
    """What gives a checkpoint's held-out loss: compiled once, its data read once.

    Args:
      config: the run; its model must be the checkpoints', of its adapter nothing is read.
      checkpoint: one of them. Its tokenizer must be the run's, and is taken where the run says
        that one be trained.
      own_tokenizer: False where the checkpoints have none.
      say: told what is prepared, once.

    Raises:
      ConfigError: nothing is held out, an objective that needs what isn't stored here, another
        tokenizer; from the function, another model.
      DataError, TokenizerError, InterchangeError: one line each.
    """
    config = _scored(config)
    mesh = make_mesh(config.mesh)
    own = open_source(checkpoint).load_tokenizer() if own_tokenizer else None
    with tempfile.TemporaryDirectory(prefix="llama_jax_held_out_") as folder:
        with jax.set_mesh(mesh):
            loss = _make(config, mesh, _Data(Path(folder), own, str(checkpoint)), say)
        yield loss


@dataclasses.dataclass(frozen=True)
class _Data:
    """Where held-out data is tokenised, and by what the checkpoints' ids are."""

    folder: Path
    own: Tokenizer | None
    checkpoint: str

    def tokenizer(self, config: RunConfig) -> Tokenizer:
        if isinstance(config.tokenizer, TrainedTokenizer):
            if self.own is None:
                raise ConfigError(
                    "a trained one is the checkpoints' own, which is left out", key="tokenizer.kind"
                )
            return self.own
        tokenizer = open_tokenizer(config, self.folder)
        if self.own is not None and self.own.fingerprint != tokenizer.fingerprint:
            raise ConfigError(
                f"another one than that of {self.checkpoint}, whose ids it would not give",
                key="tokenizer",
            )
        return tokenizer


def _make(config: RunConfig, mesh: Mesh, data: _Data, say: Say) -> Callable[[Source], float]:
    assembly = assemble(config, mesh)
    tokenizer = data.tokenizer(config)
    check_teacher(config, tokenizer)
    say(checked_attention(config))
    inputs = Inputs(tokenizer, [], open_part(config, "held_out", tokenizer, data.folder, say))
    batches = held_out_passes(config, inputs, mesh)
    assert batches is not None
    frozen = {}
    if assembly.objective.frozen:
        _, frozen = starting_params(config, assembly, tokenizer, mesh, say)
    told: set[str] = set()

    def loss(source: Source) -> float:
        _check_head(config, source)
        with jax.set_mesh(mesh):
            start = load_params_into(source, config.model, config.execution, mesh)
            for note in set(start.notes) - told:
                say(note)
                told.add(note)
            params = nnx.state(start.model)
            return evaluate_params(
                params, frozen, assembly.eval_step, assembly.objective, batches, mesh
            ).loss

    return loss


def _scored(config: RunConfig) -> RunConfig:
    """The run as whole models are held against it."""
    if not config.data.held_out:
        raise ConfigError("nothing is held out to choose by", key="data.held_out")
    objective = config.objective
    if isinstance(objective, DistillConfig) and objective.teacher == "stored":
        raise ConfigError(
            "what is stored of a teacher is a run's own; set it to 'live'", key="objective.teacher"
        )
    init = config.init
    if isinstance(objective, DPOConfig) and objective.reference_source is not None:
        if init is not None and init.adapter is not None:
            raise ConfigError(
                "the reference would be the base alone; `convert` both to one checkpoint and name "
                "that in init.path",
                key="init.adapter",
            )
        objective = dataclasses.replace(objective, reference="live")
    if init is not None:
        init = dataclasses.replace(init, adapter=None)
    return dataclasses.replace(config, objective=objective, adapter=None, init=init)


def _check_head(config: RunConfig, source: Source) -> None:
    # Loading would draw a reward head that isn't there; its loss would be of chance.
    if source.config.head != config.model.head:
        raise ConfigError(
            f"'{config.model.head}', but '{source.config.head}' in {source.path}", key="model.head"
        )
