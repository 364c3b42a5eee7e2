"""What TRL makes of small models and batches: records, cases, and the figures themselves.

Run as a script (trl, torch, transformers installed) to write `trl_figures.json` anew.
"""

import json
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

from response_batches import MISMATCHED, MODEL, REJECTED, SCALAR, Response, Row
from weights_by_seed import END, transformers_model

from llama_jax.config.post_training import DistillConfig, DPOConfig, RewardConfig

STORED = Path(__file__).parent / "trl_figures.json"
# Chosen responses of one length: TRL's likelihood term is a mean over the batch's tokens, ours of
# each response's mean.
_RESPONSES = (
    ((5, 6, 7), (20, 21, END), (22, END)),
    ((8, 9), (23, 31, END), (24, 25, 26, END)),
    ((10, 11, 12, 13), (27, 28, END), (29, 30, 33, 34, END)),
    ((14,), (35, 36, END), (37, 38, END)),
)
RECORDS = tuple((Response(p, c), Response(p, r, REJECTED)) for p, c, r in _RESPONSES)
STRENGTHS = (3, 2, 1, 0)
ROWS = tuple(Row(r, ((1, 2, s),)) for r, s in zip(RECORDS, STRENGTHS, strict=True))
# The mismatched response is the next record's chosen one.
KTO_ROWS = tuple(
    Row(
        (*record, Response(record[0].prompt, RECORDS[(i + 1) % 4][0].tokens, MISMATCHED)),
        ((1, 2, 0),),
    )
    for i, record in enumerate(RECORDS)
)
POLICY, REFERENCE = 0, 1  # seeds

DPO_CASES = {
    "dpo": DPOConfig(reference="live", nll_weight=0.0),
    "dpo_with_nll": DPOConfig(reference="live"),
    "cdpo": DPOConfig(reference="live", nll_weight=0.0, label_smoothing=0.2),
    "ipo": DPOConfig(loss="ipo", reference="live", nll_weight=0.0, beta=0.2),
    "hinge": DPOConfig(loss="hinge", reference="live", nll_weight=0.0, beta=0.5),
    "length_normalised": DPOConfig(
        loss="length_normalised", reference="live", nll_weight=0.0, beta=2.0
    ),
    "simpo": DPOConfig(loss="simpo", nll_weight=0.0, beta=2.0, gamma=0.7),
    "kto": DPOConfig(
        loss="kto", reference="live", nll_weight=0.0, desirable_weight=1.5, undesirable_weight=0.5
    ),
}
REWARD_CASES = {
    "reward": RewardConfig(),
    "reward_with_margins": RewardConfig(margins="small"),
    "reward_with_penalty": RewardConfig(mean_reward_penalty=0.04),
}
DISTILL_CASES = {
    "forward_kl": DistillConfig("teacher"),
    "reverse_kl": DistillConfig("teacher", divergence="reverse_kl", temperature=2.0),
    "jsd": DistillConfig("teacher", divergence="jsd", beta=0.3, temperature=0.7),
}


def trl_figures() -> dict[str, dict[str, float]]:
    """Loss and metrics of every case."""
    with tempfile.TemporaryDirectory() as folder:
        preferences = {name: _dpo(config, folder) for name, config in DPO_CASES.items()}
        rewards = {name: _reward(config, folder) for name, config in REWARD_CASES.items()}
    distillation = {name: _distill(config) for name, config in DISTILL_CASES.items()}
    return preferences | rewards | distillation


def _dpo(config: DPOConfig, folder: str) -> dict[str, float]:
    if config.loss == "simpo" or config.label_smoothing:
        return _of_log_probabilities(config)
    return _kto(config, folder) if config.loss == "kto" else _pairs(config, folder)


def _pairs(config: DPOConfig, folder: str) -> dict[str, float]:
    from trl import DPOConfig as Arguments
    from trl import DPOTrainer

    kinds = {"length_normalised": "sigmoid_norm"}
    kind, nll = kinds.get(config.loss, config.loss), config.nll_weight
    arguments = Arguments(
        folder,
        beta=config.beta,
        loss_type=[kind, "sft"] if nll else [kind],
        loss_weights=[1.0, nll] if nll else [1.0],
        **_QUIET,
    )
    trainer = DPOTrainer(
        transformers_model(POLICY),
        transformers_model(REFERENCE),
        arguments,
        train_dataset=_dataset(prompt="w5", chosen="w6", rejected="w7"),
        processing_class=_tokenizer(),
    )
    examples = [
        {"prompt_ids": [*c.prompt], "chosen_ids": [*c.tokens], "rejected_ids": [*r.tokens]}
        for c, r in RECORDS
    ]
    return _figures(trainer, trainer.data_collator(examples))


def _kto(config: DPOConfig, folder: str) -> dict[str, float]:
    from trl import KTOConfig, KTOTrainer

    arguments = KTOConfig(
        folder,
        beta=config.beta,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
        per_device_train_batch_size=8,
        **_QUIET,
    )
    row = {"prompt": "w5", "completion": "w6", "label": True}
    dataset = _dataset(**row).add_item(row).add_item({**row, "completion": "w7", "label": False})
    trainer = KTOTrainer(
        transformers_model(POLICY),
        transformers_model(REFERENCE),
        arguments,
        train_dataset=dataset,
        processing_class=_tokenizer(),
    )
    examples = [
        {
            "prompt_ids": [*response.prompt],
            "completion_ids": [*response.tokens],
            "KL_completion_ids": [*row.responses[2].tokens],
            "label": response.role != REJECTED,
        }
        for row in KTO_ROWS
        for response in row.responses[:2]
    ]
    return _figures(trainer, trainer.data_collator(examples))


def _reward(config: RewardConfig, folder: str) -> dict[str, float]:
    from trl import RewardConfig as Arguments
    from trl import RewardTrainer

    # Theirs is of the pair's sum, squared; ours of its mean.
    weight = config.mean_reward_penalty / 4 or None
    trainer = RewardTrainer(
        transformers_model(POLICY, SCALAR),
        Arguments(folder, center_rewards_coefficient=weight, **_QUIET),
        train_dataset=_dataset(chosen="w6", rejected="w7"),
        processing_class=_tokenizer(),
    )
    margins = {"none": (None,) * 4, "small": (1.0, 2 / 3, 1 / 3, 0.0)}[config.margins]
    examples = [
        {"chosen_ids": [*c.prompt, *c.tokens], "rejected_ids": [*r.prompt, *r.tokens]}
        | ({} if margin is None else {"margin": margin})
        for (c, r), margin in zip(RECORDS, margins, strict=True)
    ]
    return _figures(trainer, trainer.data_collator(examples))


def _figures(trainer: Any, batch: dict[str, Any]) -> dict[str, float]:
    """The loss of a batch, and what the trainer then has noted."""
    import torch

    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)
    noted = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
    names = {
        "rewards/chosen": "chosen_reward",
        "rewards/rejected": "rejected_reward",
        "rewards/margins": "margin",
        "rewards/accuracies": "accuracy",
        "margin": "margin",
        "accuracy": "accuracy",
        "kl": "divergence",
    }
    return {"loss": float(loss)} | {
        ours: float(noted[theirs]) for theirs, ours in names.items() if theirs in noted
    }


def _of_log_probabilities(config: DPOConfig) -> dict[str, float]:
    """By CPO's trainer, whose losses take log-probabilities as they are: SimPO's means, or ratios.

    DPO's trainer has no label smoothing of the conservative kind.
    """
    from trl.experimental.cpo import CPOTrainer

    simpo = config.loss == "simpo"
    trainer = types.SimpleNamespace(
        alpha=0.0,
        accelerator=types.SimpleNamespace(device="cpu"),
        loss_type="simpo" if simpo else "sigmoid",
        simpo_gamma=config.gamma,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
    )
    sides = [_logps(POLICY, side, mean=simpo) for side in (0, 1)]
    if not simpo:
        sides = [logps - _logps(REFERENCE, side, mean=False) for side, logps in enumerate(sides)]
    losses, chosen, rejected = CPOTrainer.cpo_loss(trainer, *sides)
    return {
        "loss": float(losses.mean()),
        "chosen_reward": float(chosen.mean()),
        "rejected_reward": float(rejected.mean()),
        "margin": float((chosen - rejected).mean()),
        "accuracy": float((chosen > rejected).float().mean()),
    }


def _logps(seed: int, side: int, *, mean: bool) -> Any:
    import torch
    from trl.experimental.cpo import CPOTrainer

    model, results = transformers_model(seed), []
    for record in RECORDS:
        ids = torch.tensor([[*record[side].prompt, *record[side].tokens]])
        labels = ids.clone()
        labels[:, : len(record[side].prompt)] = -100
        with torch.no_grad():
            logits = model(ids).logits
        results.append(CPOTrainer.get_batch_logps(logits, labels, average_log_prob=mean))
    return torch.cat(results)


def _distill(config: DistillConfig) -> dict[str, float]:
    """The mean over target tokens; theirs has no temperature squared."""
    import torch
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    logits, labels = {POLICY: [], REFERENCE: []}, []
    for response in (response for record in RECORDS for response in record):
        ids = torch.tensor([[*response.prompt, *response.tokens]])
        for seed, found in logits.items():
            with torch.no_grad():
                found.append(transformers_model(seed)(ids).logits[0, len(response.prompt) - 1 : -1])
        labels.append(torch.tensor(response.tokens))
    student, teacher = (torch.cat(found)[None] for found in logits.values())
    ends = {"forward_kl": 0, "reverse_kl": 1}
    loss = GKDTrainer.generalized_jsd_loss(
        student,
        teacher,
        labels=torch.cat(labels)[None],
        beta=ends.get(config.divergence, config.beta),
        temperature=config.temperature,
    )
    nll = torch.nn.functional.cross_entropy(student[0], torch.cat(labels))
    return {"loss": float(loss) * config.temperature**2, "nll": float(nll)}


_QUIET = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True}


def _dataset(**row: Any) -> Any:
    from datasets import Dataset

    return Dataset.from_list([row])


def _tokenizer() -> Any:
    """One word for each id, "w5" for 5; what TRL asks for, though the batches are of ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(MODEL.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w0", eos_token=f"w{END}", unk_token="w1"
    )


def stored() -> dict[str, dict[str, float]]:
    """The figures in the test tree."""
    return json.loads(STORED.read_text())["figures"]


def write() -> None:
    """Write them anew, with the versions that they are of."""
    import torch
    import transformers
    import trl

    modules = {"trl": trl, "transformers": transformers, "torch": torch}
    versions = {name: module.__version__ for name, module in modules.items()}
    table = {"versions": versions, "figures": trl_figures()}
    STORED.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    write()
    sys.stdout.write(STORED.read_text())
