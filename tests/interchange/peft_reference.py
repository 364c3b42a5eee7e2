"""Adapters that PEFT made on a model of transformers, with its outputs: `peft_reference/`.

Run with a Python that has `peft`, torch and transformers to make them again. The model beside them
is `in_memory.random_source()`, which NumPy alone makes the same anywhere.
"""

import json
import sys
from pathlib import Path

import numpy as np
from in_memory import random_source
from tiny_checkpoints import write_folder

from llama_jax.interchange.hugging_face_names import to_hugging_face

FOLDER = Path(__file__).parent / "peft_reference"
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "lora": {"r": 2, "lora_alpha": 3, "target_modules": EVERY},
    "dora": {"r": 2, "lora_alpha": 4, "target_modules": EVERY, "use_dora": True},
    "rslora": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "layer": {"r": 2, "lora_alpha": 2, "target_modules": ["k_proj", "down_proj"],
              "layers_to_transform": [1]},
    "reward": {"r": 2, "lora_alpha": 2, "target_modules": ["o_proj"], "task_type": "SEQ_CLS"},
}  # fmt: skip
IDS = np.random.default_rng(5).integers(0, 288, 10).astype(np.int32)


def base_folder(folder: Path) -> Path:
    """The model as a Hugging Face folder."""
    source = random_source()
    tensors = {to_hugging_face(name): array for name, array in source.arrays.items()}
    return write_folder(folder, source.config, style="new", tensors=tensors)


def their_base(folder: Path, *, reward: bool = False):
    import torch
    import transformers

    if not reward:
        return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return transformers.LlamaForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, num_labels=1, pad_token_id=0
    )


def their_outputs(model, *, reward: bool = False) -> np.ndarray:
    """Logits [T, V] of the ids, or the last one's reward [1]."""
    import torch

    with torch.no_grad():
        out = model(
            torch.from_numpy(IDS[None]).long(), attention_mask=torch.ones(1, len(IDS))
        ).logits
    return out[0].float().numpy() if not reward else out[0].numpy()


def their_adapter(base, settings, seed: int = 0):
    """A PEFT model whose factors and magnitudes are random."""
    import peft
    import torch

    model = peft.get_peft_model(base, peft.LoraConfig(**{"task_type": "CAUSAL_LM", **settings}))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_magnitude" in name:
                value.mul_(1 + 0.3 * torch.randn_like(value))
            elif "lora_" in name or "score.modules_to_save" in name:
                value.copy_(0.3 * torch.randn_like(value))
    return model.eval()


def make_all(scratch: Path) -> None:
    base = base_folder(scratch / "base")
    for name, settings in CASES.items():
        reward = name == "reward"
        model = their_adapter(their_base(base, reward=reward), settings)
        folder = FOLDER / name
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        table = json.loads((folder / "adapter_config.json").read_text())
        table["base_model_name_or_path"] = "base"
        (folder / "adapter_config.json").write_text(json.dumps(table, indent=1) + "\n")
        np.save(FOLDER / f"{name}.npy", their_outputs(model, reward=reward))


if __name__ == "__main__":
    make_all(Path(sys.argv[1]))
