"""Rounds of post-training: the stages of each round as the file says, and what begins them."""

from pathlib import Path

from llama_jax.config.run_files import checkpoint_path
from llama_jax.data.files import local_path
from llama_jax.recipes.data_stages import critic_stage, sample_stage, score_stage
from llama_jax.recipes.model_stages import average_stage, compare_stage
from llama_jax.recipes.rounds import Artifacts, run_rounds
from llama_jax.recipes.settings import RoundsConfig, StageName, TrainTable
from llama_jax.recipes.stages import Say, Stage
from llama_jax.recipes.training_stages import train_first, training_stage

# The artifact that each training stage's model becomes.
_TRAINED = {"sft": "model", "dpo": "model", "reward": "reward_model"}


def run_post_training(config: RoundsConfig, folder: Path, *, say: Say = print) -> Artifacts:
    """Run all rounds in `folder`, from where an earlier call ended; what there is afterwards.

    Raises:
      ConfigError, RecipeError, and what the stages raise: one line each.
    """
    given = [config.start, config.score.reward if config.score is not None else None]
    train_first([path for path in given if path is not None])
    return run_rounds(
        folder,
        config.rounds,
        lambda number: make_stages(config, number),
        first_artifacts(config),
        say=say,
        between=lambda number, artifacts: _next(config, number, artifacts),
    )


def make_stages(config: RoundsConfig, number: int) -> list[Stage]:
    """The stages of round `number`, from 1."""
    return [_stage(config, name, number) for name in config.order]


def first_artifacts(config: RoundsConfig) -> dict[str, Path]:
    """What there is before the first round."""
    start = checkpoint_path(config.start)
    artifacts = {
        "start": start,
        "last": start,
        "model": start,
        "prompts": local_path(config.prompts[0]),
    }
    if config.held_out is not None:
        artifacts["held_out"] = local_path(config.held_out)
    if config.score is not None and config.score.reward is not None:
        artifacts["reward_model"] = checkpoint_path(config.score.reward)
    return artifacts


def _next(config: RoundsConfig, number: int, artifacts: Artifacts) -> dict[str, Path]:
    prompts = config.prompts[0] if len(config.prompts) == 1 else config.prompts[number - 1]
    return {**artifacts, "last": artifacts["model"], "prompts": local_path(prompts)}


def _stage(config: RoundsConfig, name: StageName, number: int) -> Stage:
    if name in _TRAINED:
        table = getattr(config, name)
        assert isinstance(table, TrainTable)
        return training_stage(name, table, makes=_TRAINED[name], key=f"{name}.run")
    if name == "average":
        return average_stage(config)
    makers = {
        "sample": sample_stage,
        "score": score_stage,
        "critic": critic_stage,
        "compare": compare_stage,
    }
    return makers[name](config, number)
