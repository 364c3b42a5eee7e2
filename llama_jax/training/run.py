"""From a run's config to a trained model in its run directory; goes on where an earlier one ended.

config.toml   the resolved config             metrics.jsonl  an object a step
run.json      fingerprint and every start     tensorboard/   the same as event files
tokenizer/    made or copied on first use     plots/         the loss curve
data/         tokenised on first use          samples.txt    what the model writes
checkpoints/  state and data position         result.json    the figures of the finished run
profile/      a trace of chosen steps         origins.json   models that going on reads again
"""

import dataclasses
import time
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from rich.console import Console

from llama_jax.checkpoint.manager import Checkpoints
from llama_jax.config.loading import fingerprint, to_table
from llama_jax.config.run import DistillConfig, RunConfig
from llama_jax.config.run_files import CHECKPOINTS_FOLDER, RESULT_FILE, write_json
from llama_jax.metrics.compression import compressed_bits_per_byte
from llama_jax.metrics.plots import plot_figures, plot_loss
from llama_jax.models.accounting import flops_per_token, param_count
from llama_jax.sharding.mesh import make_mesh
from llama_jax.training.assembly import Assembly, assemble, checked_attention, needs_reference
from llama_jax.training.inputs import (
    Inputs,
    Say,
    held_out_passes,
    held_out_texts,
    local_folder,
    prepare_inputs,
    start_batches,
)
from llama_jax.training.loop import Parts, run_steps
from llama_jax.training.networks import Networks
from llama_jax.training.notices import printer, say_devices, say_sizes
from llama_jax.training.origins import check_origins, note_origins, reference_identity
from llama_jax.training.profiling import Profiler, ProfileRange
from llama_jax.training.reference import Reference, attach_reference
from llama_jax.training.reporting import Reporter, RunFacts, loss_records
from llama_jax.training.run_dir import (
    absolute,
    check_against_earlier,
    finished_figures,
    note_start,
)
from llama_jax.training.samples import write_samples
from llama_jax.training.starting import starting_params
from llama_jax.training.state import TrainState, init_state, saved_part, target_tokens
from llama_jax.training.stopping import StopRequest
from llama_jax.training.teacher import attach_teacher, check_teacher


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
      run_dir: where everything is.
      step: of the last checkpoint.
      figures: those of the finished run, as in `result.json`; None while it isn't finished.
      exit_code: 0, or 130 or 143 when a signal stopped it.
      already_done: whether it had been finished before this call.
    """

    run_dir: epath.Path
    step: int
    figures: dict[str, Any] | None
    exit_code: int = 0
    already_done: bool = False


def train(
    config: RunConfig,
    run_dir: epath.PathLike,
    console: Console,
    *,
    profile: ProfileRange | None = None,
) -> Outcome:
    """Train, from the newest checkpoint in `run_dir` if there is one, on any mesh.

    Args:
      config: the run.
      run_dir: where everything goes.
      console: where progress is shown.
      profile: the steps to trace.

    Raises:
      ConfigError: a config that can't be used, or that contradicts the checkpoint.
      TrainingError, CheckpointError, DataError, TokenizerError: one line each.
    """
    begun_s = time.perf_counter()
    run_dir = absolute(run_dir)
    say = printer(console)
    mesh = make_mesh(config.mesh)
    with (
        Checkpoints(run_dir / CHECKPOINTS_FOLDER, config.checkpoint, say) as checkpoints,
        jax.set_mesh(mesh),
    ):
        steps = checkpoints.steps()
        moved = check_against_earlier(config, run_dir, steps, say)
        figures = finished_figures(config, run_dir, steps)
        if steps and (figures is None or moved):
            # A finished run reads nothing, but whoever reads it goes by its config.
            check_origins(config, run_dir, remade=figures is not None)
        note_start(config, run_dir)
        if figures is not None:
            if profile is not None:
                profile.check(config.training.steps, config.training.steps)
            return Outcome(run_dir, config.training.steps, figures, already_done=True)
        return _Run(config, run_dir, mesh, checkpoints, console, profile).train(begun_s)


class _Run:
    """The objects of one call of `train`."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: epath.Path,
        mesh: Mesh,
        checkpoints: Checkpoints,
        console: Console,
        profile: ProfileRange | None,
    ) -> None:
        self.config, self.run_dir, self.mesh = config, run_dir, mesh
        self.checkpoints, self.console, self.profile = checkpoints, console, profile
        self.say: Say = printer(console)

    def train(self, begun_s: float) -> Outcome:
        """Prepare, restore or initialise, run the loop, and finish."""
        config = self.config
        say_devices(config, self.mesh, self.say)
        assembly = assemble(config, self.mesh)
        self.say(checked_attention(config))
        inputs = prepare_inputs(config, self.run_dir, self.say)
        check_teacher(config, inputs.tokenizer)
        say_sizes(config, inputs, self.say)

        restored = self.checkpoints.restore_latest(saved_part(assembly.abstract_state))
        if restored is None:
            step, position = 0, None
            note_origins(config, self.run_dir)
            params, frozen = starting_params(
                config, assembly, inputs.tokenizer, self.mesh, self.say
            )
            key = jax.random.key(config.seed)
            average = config.training.ema_decay is not None
            state = init_state(params, assembly.optimizer, key, frozen, average=average)
        else:
            step, state, position = restored.step, restored.state, restored.position
            self.say(f"going on from the checkpoint of step {step}")
            if assembly.abstract_state.frozen:
                _, frozen = starting_params(config, assembly, inputs.tokenizer, self.mesh, self.say)
                state = dataclasses.replace(state, frozen=frozen)
        if self.profile is not None:
            self.profile.check(config.training.steps, step)

        if restored is None and config.init is not None:
            self._write_samples(state, assembly.networks, inputs, "samples_before.txt")
        inputs = self._with_reference(assembly, inputs, state if restored is None else None)
        facts = RunFacts(
            name=self.run_dir.name,
            steps=config.training.steps,
            flops_per_token=flops_per_token(config.model, config.data.seq_len, config.adapter),
            config=to_table(config),
        )
        profiler = Profiler(self.profile, self.run_dir, self.say)
        batches = start_batches(config, inputs, self.mesh, position)
        try:
            with (
                StopRequest() as stop,
                Reporter(
                    self.run_dir, config.metrics, facts, self.console, from_step=step
                ) as reporter,
            ):
                parts = Parts(
                    mesh=self.mesh,
                    train_step=assembly.train_step,
                    eval_step=assembly.eval_step,
                    objective=assembly.objective,
                    batches=batches,
                    held_out=held_out_passes(config, inputs, self.mesh),
                    checkpoints=self.checkpoints,
                    reporter=reporter,
                    training=config.training,
                    checkpoint=config.checkpoint,
                    profiler=profiler,
                )
                state = run_steps(parts, state, step, stop)
                seconds = reporter.goodput.summary()
        finally:
            profiler.close()
            batches.close()
        return self._finish(state, assembly.networks, inputs, stop, seconds, begun_s)

    def _with_reference(
        self, assembly: Assembly, inputs: Inputs, first: TrainState | None
    ) -> Inputs:
        """The inputs with what another model says of them, if that is asked.

        Args:
          first: the state at step 0; None in a run that goes on, where weights are made again if
            what they said was not stored.
        """
        config = self.config
        folder = local_folder(self.run_dir)
        if isinstance(config.objective, DistillConfig) and config.objective.teacher == "stored":
            return attach_teacher(config, inputs, self.mesh, folder, self.say)
        if not needs_reference(config):
            return inputs

        def params() -> Any:
            if first is not None:
                return first.params, first.frozen
            check_origins(config, self.run_dir, remade=True)
            return starting_params(config, assembly, inputs.tokenizer, self.mesh, self.say)

        reference = Reference(
            assembly.networks,
            params,
            identity=lambda: reference_identity(config),
            begins=first is not None,
        )
        return attach_reference(config, inputs, reference, self.mesh, folder, self.say)

    def _finish(
        self,
        state: TrainState,
        networks: Networks,
        inputs: Inputs,
        stop: StopRequest,
        seconds: dict[str, float],
        begun_s: float,
    ) -> Outcome:
        """Draw the curve; of a run that has reached its last step also samples and figures."""
        writes = jax.process_index() == 0
        step = int(state.step)
        records = loss_records(self.run_dir)
        if writes:
            plots, name = self.run_dir / "plots", self.run_dir.name
            plot_loss(records, plots / "loss.png", name)
            plot_figures(records, plots / "figures.png", name)
        if step < self.config.training.steps:
            return Outcome(self.run_dir, step, None, stop.exit_code)
        self._write_samples(state, networks, inputs)
        held_out = [record["held_out"] for record in records if "held_out" in record]
        figures: dict[str, Any] = {
            "step": step,
            "fingerprint": fingerprint(self.config),
            "parameters": param_count(self.config.model),
            "target_tokens": target_tokens(state),
            "loss": next((r["loss"] for r in reversed(records) if "loss" in r), None),
            "held_out": held_out[-1] if held_out else None,
            "compressors": self._compressors(),
            "seconds": {**seconds, "with_preparation": time.perf_counter() - begun_s},
        }
        if writes:
            write_json(self.run_dir / RESULT_FILE, figures)
        return Outcome(self.run_dir, step, figures, stop.exit_code)

    def _write_samples(
        self, state: TrainState, networks: Networks, inputs: Inputs, file: str = "samples.txt"
    ) -> None:
        if self.config.training.sample_prompts:
            write_samples(
                self.config, networks, state, inputs.tokenizer, self.mesh, self.run_dir / file
            )

    def _compressors(self) -> dict[str, float] | None:
        """Bits a byte of gzip and xz on the held-out text, where it is at hand as text."""
        texts = held_out_texts(self.config.data)
        if texts is None or jax.process_index() > 0:
            return None
        return compressed_bits_per_byte(texts)
