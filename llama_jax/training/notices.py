"""What a run says of itself as it starts: its devices, its sizes."""

import jax
from jax.sharding import Mesh
from rich.console import Console

from llama_jax.config.hardware import chip_of, find_slice
from llama_jax.config.run import RunConfig
from llama_jax.models.accounting import param_count
from llama_jax.quantization.dot import without_units
from llama_jax.training.inputs import Inputs, Say


def printer(console: Console) -> Say:
    """Lines for the console, from the first process alone."""

    def say(message: str) -> None:
        if jax.process_index() == 0:
            console.print(message, highlight=False, soft_wrap=True, markup=False)

    return say


def say_devices(config: RunConfig, mesh: Mesh, say: Say) -> None:
    """Where these devices are not those the run was made for, or lack units that it asks for."""
    hardware, devices = config.hardware, list(mesh.devices.flat)
    chip = chip_of(devices[0].device_kind)
    lost = chip and without_units(config.execution.matmul_precision, chip)
    if lost:
        say(lost)
    if hardware is None:
        return
    meant = find_slice(hardware.slice)
    wanted = meant.num_devices * hardware.slices
    if chip is not meant.chip or len(devices) != wanted:
        say(
            f"hardware: made for {hardware.slices} x {meant.name} ({wanted} devices "
            f"{meant.chip.device_kind}), runs on {len(devices)} devices "
            f"{devices[0].device_kind}"
        )


def say_sizes(config: RunConfig, inputs: Inputs, say: Say) -> None:
    """Of the model, the data and the steps."""
    if config.training.eval_every is not None and not config.data.held_out:
        say("training.eval_every has no effect: data.held_out is empty")
    batch_tokens = config.data.batch_size * config.data.seq_len
    epochs = config.training.steps * batch_tokens / max(inputs.train_tokens, 1)
    say(
        f"model: {param_count(config.model) / 1e6:.2f}M parameters; data: "
        f"{inputs.train_tokens / 1e6:.2f}M tokens of {inputs.train_bytes / 1e6:.2f} MB; "
        f"{config.training.steps} steps of {batch_tokens} tokens, {epochs:.2f} epochs"
    )
