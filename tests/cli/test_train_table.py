"""What `llama-jax train` prints at its end."""

import io

from etils import epath
from rich.console import Console

from llama_jax.cli.train_table import show_outcome
from llama_jax.config.files import load_run_config
from llama_jax.config.loading import to_table, to_toml
from llama_jax.training.run import Outcome


def test_a_finished_run_whose_records_were_thrown_away_is_still_shown(tmp_path):
    (tmp_path / "config.toml").write_text(to_toml(to_table(load_run_config("debug/sft"))))
    figures = {
        **{"step": 2, "parameters": 91_500, "target_tokens": 800, "loss": None},
        **{"held_out": None, "compressors": None},
        "seconds": {"total": 2.0, "step": 1.0, "with_preparation": 3.0},
    }
    console = Console(file=io.StringIO(), width=100)
    show_outcome(Outcome(epath.Path(tmp_path), 2, figures), console)
    said = console.file.getvalue()
    assert "91.5k" in said
    assert "training loss" not in said
