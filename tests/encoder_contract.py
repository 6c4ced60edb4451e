"""The contract of `drencoder.encoders.contract.Encoder`, as checks that every encoder's tests run.

Legend: N clients, D adapter values, K code values.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from drencoder.encoders.contract import Encoder
from drencoder.errors import EncoderError

Check = Callable[[Encoder], None]


def some_updates(encoder: Encoder, count: int, seed: int = 0) -> Tensor:
    """Standard normal updates (count, D)."""
    return torch.randn(count, encoder.update_size, generator=torch.Generator().manual_seed(seed))


def some_codes(encoder: Encoder, count: int, seed: int = 1) -> Tensor:
    """Standard normal codes (count, K)."""
    return torch.randn(count, encoder.code_size, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> bool:
    """Within `tolerance` of the wanted tensor's largest value."""
    return got.shape == wanted.shape and bool(
        ((got - wanted).abs() <= tolerance * wanted.abs().max().clamp(min=1e-30)).all()
    )


def check_satisfies_protocol(encoder: Encoder) -> None:
    assert isinstance(encoder, Encoder)
    assert encoder.update_size == encoder.segments[-1].stop
    assert 1 <= encoder.code_size <= max(encoder.update_size, 64)


def check_shapes_and_dtypes(encoder: Encoder) -> None:
    for count in (0, 1, 3):
        code_NK = encoder.encode(some_updates(encoder, count), 5)
        assert code_NK.shape == (count, encoder.code_size)
        update_ND = encoder.decode(code_NK, 5)
        assert update_ND.shape == (count, encoder.update_size)
        assert code_NK.dtype == update_ND.dtype == torch.float32


def check_other_dtypes(encoder: Encoder) -> None:
    update_ND, code_NK = some_updates(encoder, 2), some_codes(encoder, 2)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        rounded_ND, rounded_NK = update_ND.to(dtype), code_NK.to(dtype)
        assert close(encoder.encode(rounded_ND, 5), encoder.encode(rounded_ND.float(), 5), 1e-6)
        assert close(encoder.decode(rounded_NK, 5), encoder.decode(rounded_NK.float(), 5), 1e-6)


def check_argument_is_unchanged(encoder: Encoder) -> None:
    update_ND, code_NK = some_updates(encoder, 2), some_codes(encoder, 2)
    before = update_ND.clone(), code_NK.clone()
    encoder.encode(update_ND, 5)
    encoder.decode(code_NK, 5)
    assert torch.equal(update_ND, before[0])
    assert torch.equal(code_NK, before[1])


def check_wrong_shapes_raise(encoder: Encoder) -> None:
    wrong = [torch.zeros(2, encoder.update_size + 1), torch.zeros(encoder.update_size)]
    wrong += [torch.zeros(2, encoder.update_size, dtype=torch.int64)]
    for update_ND in wrong:
        with pytest.raises(EncoderError, match=r"build the encoder|convert"):
            encoder.encode(update_ND, 5)
    with pytest.raises(EncoderError, match="build the encoder"):
        encoder.decode(torch.zeros(2, encoder.code_size + 1), 5)


def check_same_seed_same_map(encoder: Encoder) -> None:
    update_ND = some_updates(encoder, 2)
    state = torch.random.get_rng_state()
    code_NK = encoder.encode(update_ND, 5)
    assert torch.equal(code_NK, encoder.encode(update_ND, 5))
    assert torch.equal(encoder.decode(code_NK, 5), encoder.decode(code_NK, 5))
    assert torch.equal(torch.random.get_rng_state(), state)


def check_rows_do_not_mix(encoder: Encoder) -> None:
    update_ND, code_NK = some_updates(encoder, 5), some_codes(encoder, 5)
    # Rows of very different size: BatchNorm over the batch, or any other mixing, would show.
    update_ND[1] *= 100.0
    code_NK[1] *= 100.0
    for row in range(5):
        alone = slice(row, row + 1)
        # Other batch sizes sum in another order: 2e-5 through the 30 convolutions of a U-shaped network.
        assert close(encoder.encode(update_ND[alone], 5), encoder.encode(update_ND, 5)[alone], 1e-4)
        assert close(encoder.decode(code_NK[alone], 5), encoder.decode(code_NK, 5)[alone], 1e-4)


def check_non_finite_row_stays_alone(encoder: Encoder) -> None:
    update_ND = some_updates(encoder, 3)
    clean_NK = encoder.encode(update_ND, 5)
    for bad in (torch.nan, torch.inf):
        update_ND[1, encoder.update_size // 2] = bad
        code_NK = encoder.encode(update_ND, 5)
        assert close(code_NK[[0, 2]], clean_NK[[0, 2]], 1e-4)
        assert not code_NK[1].isfinite().all(), "a broken client must be noticed"


def check_finite_in_finite_out(encoder: Encoder) -> None:
    for scale in (0.0, 1e-30, 1.0, 1e20):
        code_NK = encoder.encode(some_updates(encoder, 2) * scale, 5)
        assert code_NK.isfinite().all()
        assert encoder.decode(code_NK, 5).isfinite().all()
        assert encoder.decode(some_codes(encoder, 2) * scale, 5).isfinite().all()


def check_linear_flag(encoder: Encoder) -> None:
    update_ND, code_NK = some_updates(encoder, 6), some_codes(encoder, 6)
    encoded = encoder.encode(2.0 * update_ND.sum(0, keepdim=True), 5)
    decoded = encoder.decode(2.0 * code_NK.sum(0, keepdim=True), 5)
    additive = close(encoded, 2.0 * encoder.encode(update_ND, 5).sum(0, keepdim=True), 1e-4) and close(
        decoded, 2.0 * encoder.decode(code_NK, 5).sum(0, keepdim=True), 1e-4
    )
    assert additive == encoder.linear


def check_describe(encoder: Encoder) -> None:
    facts = encoder.describe()
    assert facts["name"] == encoder.name
    assert facts["linear"] == encoder.linear
    assert facts["code_size"] == encoder.code_size
    assert facts["ratio"] == encoder.code_size / encoder.update_size
    # Only training on clients' own gradients makes an encoder anything but public.
    assert facts["public"] is (facts.get("trained_on") != "real")
    assert isinstance(facts["memory_bytes"], int)
    assert facts["memory_bytes"] >= 4 * encoder.code_size
    assert all(isinstance(fact, str | int | float | bool) for fact in facts.values())


CONTRACT: tuple[Check, ...] = (
    check_satisfies_protocol,
    check_shapes_and_dtypes,
    check_other_dtypes,
    check_argument_is_unchanged,
    check_wrong_shapes_raise,
    check_same_seed_same_map,
    check_rows_do_not_mix,
    check_non_finite_row_stays_alone,
    check_finite_in_finite_out,
    check_linear_flag,
    check_describe,
)


def check_orthogonal_projection(encoder: Encoder, scale: float, weight_K: torch.Tensor | float = 1.0) -> None:
    """encode = s P with P P^T = I and decode = P^T W / s, seen through vectors only (no dense basis)."""
    update_ND, code_NK = some_updates(encoder, 3), some_codes(encoder, 3)

    def back(code: torch.Tensor) -> torch.Tensor:
        return encoder.decode(code / weight_K, 5)

    assert close(encoder.encode(back(code_NK), 5), code_NK, 1e-4)  # P P^T = I
    once_ND = back(encoder.encode(update_ND, 5))
    assert close(back(encoder.encode(once_ND, 5)), once_ND, 1e-4)  # idempotent
    # <s P u, c> = s^2 <u, P^T c / s>: P^T is the adjoint up to scale, so the projection is orthogonal.
    left = (encoder.encode(update_ND, 5) * code_NK).sum(1)
    right = scale**2 * (update_ND * back(code_NK)).sum(1)
    assert torch.allclose(left, right, rtol=1e-3, atol=1e-3 * scale * code_NK.norm().item())
    # Rows of P have norm one: |P^T c| = |c|.
    assert torch.allclose(back(code_NK).norm(dim=1) * scale, code_NK.norm(dim=1), rtol=1e-4)
