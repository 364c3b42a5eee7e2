"""`python -m llama_jax`: the same as `llama-jax`."""

import sys

from llama_jax.cli.main import main

sys.exit(main())
