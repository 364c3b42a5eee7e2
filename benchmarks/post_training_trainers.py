"""Theirs in `post_training_beside_trl.py`: TRL's and transformers' trainers, held between steps."""

import os
import tempfile
from typing import Any

import numpy as np
from post_training_ours import (
    B2,
    BETA,
    CLIP_NORM,
    DECAY,
    END,
    NLL_WEIGHT,
    PAD,
    RATE,
    UNKNOWN,
    Case,
    Turns,
    prompt_len,
    sequences,
)
from train_step import model_config


def write_weights(model: str, folder: str) -> None:
    """Random weights, drawn by transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    from llama_jax.interchange.hugging_face_config import to_config_json

    logging.disable_progress_bar()
    torch.manual_seed(0)
    table = to_config_json(model_config(model), "float32")
    LlamaForCausalLM(LlamaConfig(**table)).save_pretrained(folder)


def run_trainer(case: Case, turns: Turns) -> None:
    """TRL's trainer of the stage, or transformers' own; a callback waits for its turn."""
    import torch
    from transformers import TrainerCallback

    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as many as XLA takes
    losses = []

    class Waiting(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            turns.wait()

        def on_step_end(self, args, state, control, **kwargs):
            turns.answer(float(losses[-1]))

    with tempfile.TemporaryDirectory() as folder:
        kind, arguments = trainer_of(case, folder)

        class Remembering(kind):
            def training_step(self, *args, **kwargs):
                losses.append(super().training_step(*args, **kwargs))
                return losses[-1]

        trainer = Remembering(args=arguments, callbacks=[Waiting()], **trainer_parts(case))
        turns.tell({})
        trainer.train()


def trainer_of(case: Case, folder: str) -> tuple[Any, Any]:
    """The class, and its arguments."""
    common: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": case.sequences,
        "max_steps": case.steps,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "adam_beta2": B2,
        "weight_decay": DECAY,
        "max_grad_norm": CLIP_NORM,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    if case.engine == "transformers":
        from transformers import Trainer, TrainingArguments

        return Trainer, TrainingArguments(**common)
    if case.stage == "sft":
        from trl import SFTConfig, SFTTrainer  # pyright: ignore

        return SFTTrainer, SFTConfig(**common, max_length=None)
    from trl import DPOConfig, DPOTrainer  # pyright: ignore

    common["per_device_train_batch_size"] = case.sequences // 2
    return DPOTrainer, DPOConfig(
        **common,
        max_length=None,
        beta=BETA,
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, NLL_WEIGHT],
        precompute_ref_log_probs=case.reference == "cached",
    )


def trainer_parts(case: Case) -> dict[str, Any]:
    """Model, reference, data and tokenizer."""
    import torch
    from datasets import Dataset  # pyright: ignore
    from transformers import AutoModelForCausalLM

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(case.weights, dtype=torch.float32)

    ids_ST, start = sequences(case), prompt_len(case)
    parts: dict[str, Any] = {"model": load(), "processing_class": word_tokenizer(case)}
    if case.stage == "sft":
        labels_ST = np.where(np.arange(case.seq_len) < start, -100, ids_ST)
        columns = {"input_ids": ids_ST.tolist(), "labels": labels_ST.tolist()}
    else:
        columns = {
            "prompt": [spelled(ids) for ids in ids_ST[::2, :start]],
            "chosen": [spelled(ids) for ids in ids_ST[::2, start:]],
            "rejected": [spelled(ids) for ids in ids_ST[1::2, start:]],
        }
        if case.reference == "live":
            parts["ref_model"] = load()
    return parts | {"train_dataset": Dataset.from_dict(columns)}


def word_tokenizer(case: Case) -> Any:
    """A word for each id, " w5" for 5: TRL takes preferences as text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {PAD: "<pad>", UNKNOWN: "<unk>", END: "</s>"}
    words = {names.get(i, f"w{i}"): i for i in range(model_config(case.model).vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=names[UNKNOWN]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=names[PAD],
        eos_token=names[END],
        unk_token=names[UNKNOWN],
    )


def spelled(ids: np.ndarray) -> str:
    """The words of these ids."""
    return "".join(" </s>" if i == END else f" w{i}" for i in ids)
