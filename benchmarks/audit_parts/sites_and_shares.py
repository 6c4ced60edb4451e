"""Broken sites, and broken shares of secure aggregation: what a site sends and draws, what a client adds, and who is asked."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from drencoder.federated import round as one_round
from drencoder.federated import site_round
from drencoder.privacy.mechanism import quantiser_for
from drencoder.privacy.sampling import CappedSampler, UnitSampler
from drencoder.runs import asking

SiteChange = Callable[[torch.Tensor, torch.Tensor, int, tuple[int, int]], torch.Tensor]
"""(what a site sends, the same without noise, how many of its units took part, (slot, site)) -> what the broken site sends."""

ShareChange = Callable[[np.ndarray, bool], np.ndarray]
"""(a client's share of noise in steps, whether the client is the first of its round) -> what the broken client adds."""

EXPECTED_UNITS = 12  # of a site in a round


@contextlib.contextmanager
def patched(*places: tuple[Any, str, Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for owner, name, value in places:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def site_sums(change: SiteChange) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Units inside sites: what a site sends, or its share, is changed after it was noised."""
    original = site_round.release_site_sum

    def broken(batches: Any, size: int, clip_l2: float, site: int, permit: Any, noise: Any) -> Any:
        kept = list(batches)
        quantiser = quantiser_for(permit, size, clip_l2)
        noised = quantiser.to_steps(original(iter(kept), size, clip_l2, site, permit, noise))
        rows = [codes.values_NV.double() / quantiser.step for _, codes in kept]
        clean = torch.cat(rows).sum(0) if rows else torch.zeros(size, dtype=torch.float64)
        number, where = sum(len(units) for units, _ in kept), (permit.slot, site)
        changed = change(torch.from_numpy(noised).double(), clean, number, where)
        return quantiser.to_residues(changed.round().long().numpy())

    return lambda: patched((site_round, "release_site_sum", broken))


def divided(noised: torch.Tensor, clean: torch.Tensor, number: int, _where: tuple[int, int]) -> torch.Tensor:
    return noised + clean * (EXPECTED_UNITS / max(1, number) - 1)


def cancelling(count: int, *, sites: bool = False) -> SiteChange:
    """Each of `count` noises is as loud as promised, and they add up to nothing: a site's own of all rounds, or those of all sites in a round."""
    drawn: dict[int, torch.Tensor] = {}

    def change(noised: torch.Tensor, clean: torch.Tensor, _number: int, where: tuple[int, int]) -> torch.Tensor:
        slot, site = where
        of, place = (slot, site) if sites else (site, slot - 1)
        if place == 0:
            generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(7), "big"))
            drawn[of] = adding_to_nothing(torch.randn(count, len(clean), generator=generator, dtype=torch.float64))
        return clean + drawn[of][place] * (noised - clean).std()

    return change


def adding_to_nothing(noise_NV: torch.Tensor) -> torch.Tensor:
    """The same noises without their mean, and each as loud as before; one alone stays as it is."""
    count = len(noise_NV)
    return (noise_NV - noise_NV.mean(0)) * (count / (count - 1)) ** 0.5 if count > 1 else noise_NV


def half_of_the_messages() -> contextlib.AbstractContextManager[Any]:
    """Local trust: every second message is left out of the sum, which counts all of them."""
    original = asking.server_release

    def broken(query: Any, answers: Any, permit: Any, noise: Any) -> Any:
        kept = [replace(one, clients=one.clients[::2], messages=one.messages[::2]) for one in answers]
        result = original(query, kept, permit, noise)
        object.__setattr__(result.release, "contributors", 2 * result.release.contributors)
        return result

    return patched((asking, "server_release", broken))


def shares(change: ShareChange) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Secure aggregation among clients: the share of noise that each adds is another than it drew."""
    original = one_round.release_shares

    def broken(codes: Any, client_ids: Sequence[int], permit: Any, noise: Any) -> Any:
        heard: dict[int, list[Any]] = {}

        def words(*indices: int) -> Any:
            given, kept = noise.words(*indices), heard.setdefault(indices[1], [])
            return lambda count: kept.append(given(count)) or kept[-1]

        total = original(codes, client_ids, permit, SimpleNamespace(kind=noise.kind, words=words))
        quantiser = quantiser_for(permit, codes.values_NV.shape[1], codes.clip_l2)
        for client, kept in heard.items():
            again = iter(kept)
            drew = quantiser.noise(lambda _count, again=again: next(again))  # type: ignore[misc]
            total = total + quantiser.to_residues(change(drew, client == permit.cohort[0]) - drew)
        return total & np.uint32((1 << quantiser.bits) - 1)

    return lambda: patched((one_round, "release_shares", broken))


def every_round() -> contextlib.AbstractContextManager[Any]:
    original = CappedSampler.cohort

    def broken(self: Any, slot: int, attempt: int = 0) -> list[int]:
        return original(self, min(self.rates), attempt)

    return patched((CappedSampler, "cohort", broken))


def no_clip() -> contextlib.AbstractContextManager[Any]:
    """A site does not clip. No audit is needed for it: codes that are too long are not rounded, and the site stops."""
    original = site_round.clip_rows

    def broken(values_NV: torch.Tensor, clip_l2: float) -> Any:
        codes = original(values_NV, 3 * clip_l2)  # a canary fills whatever clip there is
        object.__setattr__(codes, "clip_l2", clip_l2)
        return codes

    return patched((site_round, "clip_rows", broken))


def draw_of(change: Callable[[Any, Sequence[int], float, int], list[int]]) -> Any:
    """Who is in a slot: (sampler, units, rate, site) -> those who are."""

    def broken(self: Any, units: Sequence[int], rate: float, slot: int, site: int) -> list[int]:
        return change(self, units, rate, site)

    return lambda: patched((UnitSampler, "joining", broken))


def told_number() -> contextlib.AbstractContextManager[Any]:
    original = site_round.SiteCurator.message

    def broken(self: Any, query: Any, adapter_D: torch.Tensor, site: int, permit: Any, noise: Any) -> Any:
        upload = original(self, query, adapter_D, site, permit, noise)
        return replace(upload, nonfinite=len(self.draw(site, permit)))

    return patched((site_round.SiteCurator, "message", broken))
