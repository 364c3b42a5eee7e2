"""The attention backends of this machine against `reference`, on one packed batch a head dim.

    python benchmarks/check_attention.py

Its kernel on a GPU or TPU, values and gradients: what `train` does at its start, for the shapes of
the released models.
"""

import argparse

from llama_jax.kernels.self_check import choose_and_check

# Query heads, key-value heads, head dim: Llama 3.2 1B, 3.2 3B, 3.1 8B, 3.1 70B, Llama 2 7B.
SHAPES = ((32, 8, 64), (24, 8, 128), (32, 8, 128), (64, 8, 128), (32, 32, 128))


def main() -> None:
    """Check each shape in bfloat16; an error ends it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--length", type=int, default=4096)
    args = parser.parse_args()
    for num_heads, num_kv_heads, head_dim in SHAPES:
        line = choose_and_check(
            backend=args.backend,
            context="gather",
            dtype="bfloat16",
            rows=2,
            length=args.length,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            check=True,
        )
        print(f"{num_heads} x {num_kv_heads} heads of {head_dim}: {line}", flush=True)


if __name__ == "__main__":
    main()
