"""The ring form's parts on a TPU: splash attention over one shard's keys, and its gradients.

The kernel's backward pass takes the merged output and log-sum-exp in place of its own; so called,
outside of the kernel's own gradient rule, it gives what this part of the keys adds.
Letters as in `llama_jax.kernels.splash`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel

from llama_jax.kernels.blocks import Blocks, blocks_for
from llama_jax.kernels.reference import MASKED
from llama_jax.kernels.ring import Parts
from llama_jax.kernels.splash import make_kernel, pad_to, round_up


@functools.cache
def splash_parts(device_kind: str, *, interpret: bool) -> Parts:
    """Attention over a part of the keys by the TPU kernel.

    Args:
      device_kind: JAX's name of the chip, which chooses the block sizes.
      interpret: run the kernel's Python on any device, for tests.
    """
    options = {"device_kind": device_kind, "interpret": interpret}
    return Parts(
        functools.partial(_forward, **options),
        functools.partial(_gradients, **options),
    )


class _Part:
    """The kernel for one meeting, and how arrays come to it and go."""

    def __init__(
        self,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        q_order_BT: jax.Array,
        device_kind: str,
        *,
        interpret: bool,
        save_residuals: bool,
    ) -> None:
        self.T, self.N, self.H = q_BTNH.shape[1:]
        self.S, self.K = k_BSKH.shape[1:3]
        # Halves of a shard are apart in the row: no block should hold the end of one.
        self.blocks: Blocks = blocks_for(device_kind, self.H, self.T // 2, self.S // 2)
        self.to_q = max(self.blocks.q, self.blocks.q_back)
        self.to_kv = max(self.blocks.kv, self.blocks.kv_back)
        self.order_T = q_order_BT[0]
        lengths = round_up(self.T, self.to_q), round_up(self.S, self.to_kv)
        self.kernel = make_kernel(
            self.order_T, *lengths, self.blocks, interpret=interpret, save_residuals=save_residuals
        )

    def queries(self, x_BTNH: jax.Array) -> jax.Array:
        """[B, K, G, T, H], T filled up to whole blocks."""
        padded = pad_to(x_BTNH, self.to_q)
        return padded.reshape(*padded.shape[:2], self.K, -1, x_BTNH.shape[-1]).transpose(
            0, 2, 3, 1, 4
        )

    def from_queries(self, x_BKGTH: jax.Array) -> jax.Array:
        B, _, _, T, H = x_BKGTH.shape
        return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, self.N, H)[:, : self.T]

    def scaled(self, q_BTNH: jax.Array) -> jax.Array:
        # The kernel doesn't scale; in float32, so that the rounding to q's dtype is the only one.
        return self.queries((q_BTNH.astype(jnp.float32) * self.H**-0.5).astype(q_BTNH.dtype))

    def keys(self, x_BSKH: jax.Array) -> jax.Array:
        return pad_to(x_BSKH, self.to_kv).transpose(0, 2, 1, 3)

    def from_keys(self, x_BKSH: jax.Array) -> jax.Array:
        return x_BKSH.transpose(0, 2, 1, 3)[:, : self.S]

    def ids(self, q_ids_BT: jax.Array, kv_ids_BS: jax.Array) -> kernel.SegmentIds:
        return kernel.SegmentIds(pad_to(q_ids_BT, self.to_q), pad_to(kv_ids_BS, self.to_kv))


def _forward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_segment_ids_BT: jax.Array,
    kv_segment_ids_BS: jax.Array,
    q_order_BT: jax.Array,
    device_kind: str,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    part = _Part(q_BTNH, k_BSKH, q_order_BT, device_kind, interpret=interpret, save_residuals=True)
    over_heads = jax.vmap(part.kernel, in_axes=(0, 0, 0, None))
    ids = part.ids(q_segment_ids_BT, kv_segment_ids_BS)
    arrays = part.scaled(q_BTNH), part.keys(k_BSKH), part.keys(v_BSKH)
    out_BKGTH, (log_total_BKGT,) = jax.vmap(over_heads)(*arrays, ids)  # pyright: ignore
    # Where all blocks were skipped the kernel divides 0 by 0.
    seen_T = part.order_T >= 0
    out_BTNH = jnp.where(seen_T[:, None, None], part.from_queries(out_BKGTH), 0)
    log_total_BTN = part.from_queries(log_total_BKGT[..., None])[..., 0]
    return out_BTNH.astype(jnp.float32), jnp.where(seen_T[:, None], log_total_BTN, MASKED)


def _gradients(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    out_BTNH: jax.Array,
    log_total_BTN: jax.Array,
    grad_BTNH: jax.Array,
    *,
    q_segment_ids_BT: jax.Array,
    kv_segment_ids_BS: jax.Array,
    q_order_BT: jax.Array,
    device_kind: str,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    part = _Part(q_BTNH, k_BSKH, q_order_BT, device_kind, interpret=interpret, save_residuals=False)
    infos = part.kernel.dq_mask_info, part.kernel.dkv_mask_info

    def one_head(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        out: jax.Array,
        log_total: jax.Array,
        grad: jax.Array,
        ids: kernel.SegmentIds,
    ) -> tuple[jax.Array, ...]:
        # The only way to it: the public one takes the part's own output for that of all parts.
        return kernel._splash_attention_bwd(  # pyright: ignore
            save_residuals=False,
            mask_value=kernel.DEFAULT_MASK_VALUE,
            is_mqa=True,
            block_sizes=part.kernel.kwargs["block_sizes"],
            residual_checkpoint_name=None,
            mask_function=part.kernel.kwargs["mask_function"],
            attn_logits_soft_cap=None,
            interpret=interpret,
            res=(q, k, v, ids, None, out, log_total, *infos),
            do=grad,
        )[3:6]

    heads_first = (
        part.scaled(q_BTNH),
        part.keys(k_BSKH),
        part.keys(v_BSKH),
        part.queries(out_BTNH),
        part.queries(log_total_BTN[..., None])[..., 0],
        part.queries(grad_BTNH),
    )
    over_heads = jax.vmap(one_head, in_axes=(0, 0, 0, 0, 0, 0, None))
    ids = part.ids(q_segment_ids_BT, kv_segment_ids_BS)
    grads = jax.vmap(over_heads)(*heads_first, ids)
    grad_q, grad_k, grad_v = (x.astype(jnp.float32) for x in grads)
    # The kernel's q is the scaled one.
    return part.from_queries(grad_q) * part.H**-0.5, part.from_keys(grad_k), part.from_keys(grad_v)
