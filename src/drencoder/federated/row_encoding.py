"""Encoding of a cohort's updates such that no bit of a message depends on who is encoded with it.

Legend: N clients, D adapter values, K values of a message, R rows at a time.

Products over many rows may round another way when there is one row less. On a CPU each row is encoded by itself. On a graphics card
that would be thousands of small calls for each client, so rows go through in blocks of one size, zeros where there are too few clients;
the encoder must first show with rows at random that neither a row's place nor its company moves a bit of it.
"""

import torch
from torch import Tensor

from drencoder.encoders.contract import Encoder

_BLOCK = 16


def encode_rows(encoder: Encoder, update_ND: Tensor, seed: int, rows: int) -> Tensor:
    """Messages (N, K) on the device of the updates, `rows` of them at a time."""
    if not len(update_ND):
        return encoder.encode(update_ND, seed)
    return torch.cat([_encode_block(encoder, block, seed, rows) for block in update_ND.split(rows)])


def _encode_block(encoder: Encoder, update_ND: Tensor, seed: int, rows: int) -> Tensor:
    missing = rows - len(update_ND)
    if missing:
        update_ND = torch.cat([update_ND, update_ND.new_zeros(missing, update_ND.shape[1])])
    return encoder.encode(update_ND, seed)[: rows - missing]


def is_row_exact(encoder: Encoder, seed: int, device: torch.device, rows: int = _BLOCK) -> bool:
    """Whether a row's code has the same bits first and last of `rows`, beside others, beside zeros, and beside a broken row."""
    generator = torch.Generator().manual_seed(0)
    random_ND = torch.randn(rows, encoder.update_size, generator=generator).to(device)
    turned_ND = random_ND.flip(0)
    broken_ND = random_ND.clone()
    broken_ND[1:] = torch.nan
    expected_K = encoder.encode(random_ND, seed)[0]
    others = (
        encoder.encode(turned_ND, seed)[-1],
        encoder.encode(broken_ND, seed)[0],
        _encode_block(encoder, random_ND[:1], seed, rows)[0],
    )
    return all(torch.equal(expected_K, other) for other in others)


def rows_at_once(encoder: Encoder, seed: int, device: torch.device) -> int:
    """How many rows this encoder may be given at a time on a device: 1 or a block."""
    if device.type != "cuda":
        return 1
    return _BLOCK if is_row_exact(encoder, seed, device) else 1
