"""The checkpoints that a run reads again when it goes on, and that they are still the same.

What a run trains lies in its own checkpoints. The base under adapters, a reference and a teacher
don't: a folder may have moved since, or hold another model.
"""

import hashlib
import json

import jax
from etils import epath

from llama_jax.config.loading import ConfigError, to_table
from llama_jax.config.run import DistillConfig, DPOConfig, RunConfig
from llama_jax.config.run_files import ORIGINS_FILE, write_json
from llama_jax.interchange.fingerprints import model_fingerprint
from llama_jax.interchange.opening import open_source
from llama_jax.training.networks import stored_as


def note_origins(config: RunConfig, run_dir: epath.Path) -> None:
    """Write down what a run begins with, in place of what an attempt before its first step did.

    Raises:
      InterchangeError: a checkpoint that can't be opened.
    """
    found = _fingerprints(config, remade=True)
    if found and jax.process_index() == 0:
        noted = {key: fingerprint for key, (_, fingerprint) in found.items()}
        write_json(run_dir / ORIGINS_FILE, noted)


def check_origins(config: RunConfig, run_dir: epath.Path, *, remade: bool = False) -> None:
    """See to it that the same is there before a run that goes on reads it.

    Args:
      config: the run's.
      run_dir: its directory.
      remade: whether log-probabilities of a reference that should be stored are made again.

    Raises:
      ConfigError: another model, by its fingerprint.
      InterchangeError: one that can't be opened.
    """
    path = run_dir / ORIGINS_FILE
    # Runs of earlier versions noted nothing.
    noted = json.loads(path.read_text()) if path.exists() else {}
    for key, (where, fingerprint) in _fingerprints(config, remade=remade).items():
        before = noted.get(key, fingerprint)
        if before != fingerprint:
            raise ConfigError(
                f"{where} holds another model now (fingerprint {fingerprint}) than when this run "
                f"began ({before}); give the path of that one",
                key=key,
            )


def reference_identity(config: RunConfig) -> str:
    """What tells the model that a DPO run starts from, as it is asked, from another one.

    Raises:
      InterchangeError: a checkpoint that can't be opened.
    """
    init, execution = config.init, config.execution
    told = {
        "model": to_table(config.model),
        "read": {key: value for key, (_, value) in _fingerprints(config, remade=True).items()},
        "layers": init and init.layers,
        "special_rows": init and init.special_rows,
        "seed": config.seed,
        "dtypes": (stored_as(config).param_dtype, execution.compute_dtype),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _fingerprints(config: RunConfig, *, remade: bool) -> dict[str, tuple[str, str]]:
    """By key of the config: the path there, and the fingerprint of the model."""
    found: dict[str, tuple[str, str]] = {}
    init, objective = config.init, config.objective
    sources = ("live", "cached") if remade else ("live",)
    refers = isinstance(objective, DPOConfig) and objective.reference_source in sources
    if init is not None and (config.adapter is not None or refers):
        found["init.path"] = init.path, model_fingerprint(open_source(init.path))
        if init.adapter is not None:
            merged = open_source(init.path, adapter=init.adapter)
            found["init.adapter"] = init.adapter, model_fingerprint(merged)
    if isinstance(objective, DistillConfig):
        found["objective.path"] = objective.path, model_fingerprint(open_source(objective.path))
    return found
