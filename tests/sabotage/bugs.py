"""One-line bugs that would break the promise. `plant.py` plants each one by itself and shows which test catches it.

A bug's `old` stands exactly once in its file (tests/test_sabotage.py holds that), so the list cannot rot unseen.
"""

from dataclasses import dataclass

__all__ = ["BUGS", "Bug"]


@dataclass(frozen=True)
class Bug:
    """What breaks; a module of the package without `.py`; the text that stands there and what takes its place.

    `tests` are asked in this order and may be files or folders below tests/; the first failure ends it.
    """

    breaks: str
    module: str
    old: str
    new: str
    tests: tuple[str, ...]


_MECHANISM = ("privacy/test_privacy_mechanism.py", "federated/test_releases.py", "federated", "test_neighbours.py")
_LEDGER = ("privacy", "runs/test_verify.py", "runs/test_run.py")
_ACCOUNT = ("privacy", "runs/test_verify.py")
_SECURE = ("secure_aggregation", "federated/test_secure_trust.py")
_ROUND = ("federated/test_releases.py", "federated", "runs/test_secrets.py", "runs/test_run.py", "test_neighbours.py")
_ALONE = ("test_neighbours.py", "models", "data")
_SITE = ("federated", "flower", "privacy/test_privacy_ledger.py")
_RUN = ("runs/test_secrets.py", "runs/test_run.py", "runs/test_verify.py", "test_neighbours.py", "cli")

_SECAGG_SEED = "self._seed = secrets.token_bytes(SECRET_BYTES)"
_SECAGG_KEYS = "self._sealing, self._masking = KeyAgreement(), KeyAgreement()"

BUGS: tuple[Bug, ...] = (
    # --- clip -------------------------------------------------------------------------------------
    Bug(
        "a long row keeps its length",
        "privacy/mechanism",
        "torch.where(norm_N > clip_l2, clip_l2 / norm_N, 1.0)",
        "torch.where(norm_N > clip_l2 * 2, clip_l2 / norm_N, 1.0)",
        _MECHANISM,
    ),
    Bug(
        "a row is clipped by its largest value",
        "privacy/mechanism",
        "norm_N = torch.linalg.vector_norm(double_NV, dim=1)",
        "norm_N = torch.linalg.vector_norm(double_NV, float('inf'), dim=1)",
        _MECHANISM,
    ),
    Bug(
        "rounding to float32 may pass the clip",
        "privacy/mechanism",
        "torch.where(over_N[:, None], shrunk_NV, clipped_NV)",
        "torch.where(over_N[:, None], clipped_NV, clipped_NV)",
        _MECHANISM,
    ),
    Bug(
        "a row with a NaN is cut value by value",
        "privacy/mechanism",
        "torch.where(finite_N[:, None], single_NV, 0.0)",
        "torch.nan_to_num(single_NV)",
        _MECHANISM,
    ),
    Bug(
        "the clip is three times the recipe's",
        "federated/round",
        'clip_rows(query.encode(update_ND) if spec.noise_in == "code" else update_ND, spec.clip_l2)',
        'clip_rows(query.encode(update_ND) if spec.noise_in == "code" else update_ND, 3 * spec.clip_l2)',
        _ROUND,
    ),
    Bug(
        "the second sensitivity is the first",
        "privacy/mechanism",
        'return self.clip_l2 if relation == "add_remove" else 2 * self.clip_l2',
        "return self.clip_l2",
        _MECHANISM,
    ),
    # --- noise ------------------------------------------------------------------------------------
    Bug(
        "central noise is two thirds of what was charged",
        "privacy/mechanism",
        "noise_std = permit.noise_multiplier * bounded.clip_l2",
        "noise_std = permit.noise_multiplier * bounded.clip_l2 * 2 / 3",
        _MECHANISM,
    ),
    Bug(
        "local noise does not scale with the clip",
        "privacy/mechanism",
        "noise_std = permit.noise_multiplier * codes.clip_l2",
        "noise_std = permit.noise_multiplier",
        _MECHANISM,
    ),
    Bug(
        "a trusted server adds no noise",
        "privacy/mechanism",
        "    if noise_std:\n        value_V = value_V + noise_std",
        "    if noise_std < 0:\n        value_V = value_V + noise_std",
        _MECHANISM,
    ),
    Bug(
        "the last value has no central noise (the adaptive clip's bit)",
        "privacy/mechanism",
        "value_V = value_V + noise_std * noise.normal(value_V.numel(), permit.slot).to(value_V.device)",
        "value_V = value_V + noise_std * torch.cat([noise.normal(value_V.numel(), permit.slot)[:-1],"
        " torch.zeros(1, dtype=torch.float64)]).to(value_V.device)",
        _MECHANISM,
    ),
    Bug(
        "the last value has no local noise (the adaptive clip's bit)",
        "privacy/mechanism",
        "noise_V = noise.normal(size, permit.slot, client).to(values_NV.device)",
        "noise_V = noise.normal(size, permit.slot, client).to(values_NV.device); noise_V[-1] = 0",
        _MECHANISM,
    ),
    Bug(
        "all local noise of a slot is the same",
        "privacy/mechanism",
        "noise_V = noise.normal(size, permit.slot, client).to(values_NV.device)",
        "noise_V = noise.normal(size, permit.slot, clients[0]).to(values_NV.device) if row == 0 else noise_V",
        _MECHANISM,
    ),
    Bug(
        "secure noise comes from numpy's own generator",
        "privacy/mechanism",
        'words = np.frombuffer(os.urandom(32 * count), dtype="<u8").reshape(4, count)',
        "words = np.random.default_rng(0).integers(0, 2**64, (4, count), dtype=np.uint64)",
        _MECHANISM,
    ),
    Bug(
        "secure noise is half as wide",
        "privacy/mechanism",
        "_normal(words).sum(0) / 2",
        "_normal(words).sum(0) / 4",
        _MECHANISM,
    ),
    Bug(
        "secure words of discrete noise repeat",
        "privacy/mechanism",
        'return lambda count: np.frombuffer(os.urandom(8 * count), dtype="<u8").astype(np.uint64, copy=False)',
        'return lambda count: np.frombuffer(bytes(range(8)) * count, dtype="<u8").astype(np.uint64, copy=False)',
        (*_MECHANISM, *_SECURE),
    ),
    Bug(
        "stage 1 is asked for without noise",
        "privacy/ledger",
        "return 0.0 if isinstance(self.event, NonPrivateEvent) else self.event.noise_multiplier",
        "return 0.0 if isinstance(self.event, NonPrivateEvent) or self.slot == 0 else self.event.noise_multiplier",
        ("federated", *_LEDGER),
    ),
    Bug(
        "a client's message leaves without noise under local trust",
        "federated/round",
        "values = release_codes(clipped, clients, permit, noise).values_NV",
        "release_codes(clipped, clients, permit, noise)",
        _ROUND,
    ),
    Bug(
        "noise of one kind passes for another",
        "privacy/mechanism",
        "def _check_noise(permit: Permit, noise: NoiseSource) -> None:",
        "def _check_noise(permit: Permit, noise: NoiseSource) -> None:\n    return",
        _MECHANISM,
    ),
    # --- cohorts ----------------------------------------------------------------------------------
    Bug(
        "the sum is divided by the realised cohort",
        "federated/round",
        "mean = released.value / expected_cohort",
        "mean = released.value / (released.contributors or expected_cohort * 1.01)",
        _ROUND,
    ),
    Bug(
        "a secret cohort can be drawn again from a constant",
        "privacy/ledger",
        "self._sampler = self.plan.sampler(key or secrets.token_bytes(KEY_BYTES))",
        "self._sampler = self.plan.sampler(key or bytes(KEY_BYTES))",
        _LEDGER,
    ),
    Bug(
        "a secret cohort's key is written into the ledger",
        "privacy/ledger",
        "        if not secret:\n            key = key or",
        "        if True:\n            key = key or",
        _LEDGER,
    ),
    Bug(
        "every cohort is of the first slot",
        "privacy/sampling",
        "(slot, attempt if self.fresh_attempts else 0), self.population)",
        "(0, attempt if self.fresh_attempts else 0), self.population)",
        _LEDGER,
    ),
    Bug(
        "a second attempt draws the same secret cohort",
        "privacy/sampling",
        "(slot, attempt if self.fresh_attempts else 0), self.population)",
        "(slot, 0), self.population)",
        _LEDGER,
    ),
    Bug(
        "more clients are drawn than the rate allows",
        "privacy/sampling",
        "return np.flatnonzero(u_N < rate).tolist()",
        "return np.flatnonzero(u_N < rate * 1.25).tolist()",
        _LEDGER,
    ),
    Bug(
        "an at least one client rule",
        "privacy/sampling",
        "return np.flatnonzero(u_N < rate).tolist()",
        "return np.flatnonzero(u_N < max(rate, u_N.min() + 1e-12)).tolist()",
        _LEDGER,
    ),
    Bug(
        "a capped client takes part in two slots of a block",
        "privacy/sampling",
        'u_N = _uniforms(self.key, "capped", (index,), self.population)',
        'u_N = _uniforms(self.key, "capped", (slot,), self.population)',
        _LEDGER,
    ),
    Bug(
        "the blocks of the cap are one too many",
        "privacy/sampling",
        "count = min(cap, len(slots))",
        "count = min(cap + 1, len(slots))",
        _LEDGER,
    ),
    # --- accounting -------------------------------------------------------------------------------
    Bug(
        "a Gaussian's mu forgets how often",
        "privacy/accounting",
        "total += event.count * (shift / event.noise_multiplier) ** 2",
        "total += (shift / event.noise_multiplier) ** 2",
        _ACCOUNT,
    ),
    Bug(
        "replace-one has the shift of add-remove",
        "privacy/accounting",
        'shift = 1.0 if relation == "add_remove" else 2.0',
        "shift = 1.0",
        _ACCOUNT,
    ),
    Bug(
        "replace-one is counted as add-remove where cohorts are secret",
        "privacy/accounting",
        '"replace_one": dp.NeighboringRelation.REPLACE_ONE,',
        '"replace_one": dp.NeighboringRelation.ADD_OR_REMOVE_ONE,',
        _ACCOUNT,
    ),
    Bug(
        "the sampling rate is squared",
        "privacy/accounting",
        "single = dp.PoissonSampledDpEvent(event.sampling_rate, gaussian)",
        "single = dp.PoissonSampledDpEvent(event.sampling_rate**2, gaussian)",
        _ACCOUNT,
    ),
    Bug(
        "a plan's epsilon at ten times the delta",
        "privacy/accounting",
        "return float(accountant.compose(to_dp_event(events)).get_epsilon(delta))",
        "return float(accountant.compose(to_dp_event(events)).get_epsilon(10 * delta))",
        _ACCOUNT,
    ),
    Bug(
        "equal events are counted once",
        "privacy/accounting",
        "counts[one] = counts.get(one, 0) + event.count",
        "counts[one] = event.count",
        _ACCOUNT,
    ),
    Bug(
        "a non-private release costs nothing",
        "privacy/accounting",
        "        if isinstance(event, NonPrivateEvent):\n            return math.inf\n        sampled |=",
        "        if isinstance(event, NonPrivateEvent):\n            continue\n        sampled |=",
        _ACCOUNT,
    ),
    Bug(
        "RDP under replace-one forgets the double shift",
        "privacy/accounting",
        "(event.noise_multiplier / 2, event.count)",
        "(event.noise_multiplier, event.count)",
        _ACCOUNT,
    ),
    Bug(
        "calibration stops above the target",
        "privacy/calibration",
        "goal = epsilon - 1.01 * tolerance",
        "goal = epsilon + 1.01 * tolerance",
        _ACCOUNT,
    ),
    Bug(
        "local trust is amplified by sampling against the server",
        "privacy/plan",
        "return GaussianEvent(sigma) if self.capped else PoissonGaussianEvent(self.rate(slot), sigma)",
        "return PoissonGaussianEvent(self.rate(slot), sigma)",
        _ACCOUNT,
    ),
    Bug(
        "a fellow client is taken not to know its own noise",
        "privacy/plan",
        'others = contributors - 1 if observer == "clients" else contributors',
        "others = contributors",
        _ACCOUNT,
    ),
    Bug(
        "the server is taken to see sums only",
        "privacy/plan",
        'if isinstance(event, NonPrivateEvent) or observer == "server" or',
        "if isinstance(event, NonPrivateEvent) or",
        _ACCOUNT,
    ),
    Bug(
        "codes that are decoded one by one hide behind each other",
        "privacy/plan",
        'observer == "server" or (self.nonlinear_decoding and slot > 0):',
        'observer == "server":',
        _ACCOUNT,
    ),
    Bug(
        "a block costs its cheapest slot",
        "privacy/plan",
        "events.append(min(seen, key=",
        "events.append(max(seen, key=",
        _ACCOUNT,
    ),
    Bug(
        "shares of noise are for all contributors, not for the honest ones",
        "privacy/plan",
        "return ShareTerms(sigma / math.sqrt(honest), least,",
        "return ShareTerms(sigma / math.sqrt(least), least,",
        _ACCOUNT,
    ),
    Bug(
        "drop-outs do not count",
        "privacy/plan",
        "math.ceil((1 - self.dropout_share) * self.cohort_bound(slot) - _SURE)",
        "math.ceil(self.cohort_bound(slot) - _SURE)",
        _ACCOUNT,
    ),
    # --- ledger -----------------------------------------------------------------------------------
    Bug(
        "the budget is not asked",
        "privacy/ledger",
        "        if cost > plan.budget + ROUNDING:",
        "        if cost > plan.budget * 100 + ROUNDING:",
        _LEDGER,
    ),
    Bug(
        "a permit can be used twice for a sum",
        "privacy/ledger",
        "        self._spent.add(-1)",
        "        pass",
        _LEDGER,
    ),
    Bug(
        "a client may release twice in a slot",
        "privacy/ledger",
        "        self._spent |= set(client_ids)",
        "        pass",
        _LEDGER,
    ),
    Bug(
        "a stranger to the cohort may release",
        "privacy/ledger",
        "        if strangers := set(client_ids) - set(self.cohort):",
        "        if strangers := set(client_ids) - set(self.cohort) - set(client_ids):",
        _LEDGER,
    ),
    Bug(
        "a lost slot of local trust is asked for again",
        "privacy/ledger",
        'return "skip" if self.plan.capped and self.plan.noise == "secure" else "redo"',
        'return "redo"',
        _LEDGER,
    ),
    Bug(
        "the largest number of contributors counts",
        "privacy/ledger",
        'contributors[slot] = min(record["contributors"],',
        'contributors[slot] = max(record["contributors"],',
        _LEDGER,
    ),
    Bug(
        "every second charge is not written",
        "privacy/ledger",
        'self._file.append({"kind": "charge", **record, "attempt": attempt, "event": event_to_dict(event)})',
        'slot % 2 or self._file.append({"kind": "charge", **record, "attempt": attempt, "event": event_to_dict(event)})',
        _LEDGER,
    ),
    Bug(
        "a charge names twice the noise",
        "privacy/ledger",
        'self._file.append({"kind": "charge", **record, "attempt": attempt, "event": event_to_dict(event)})',
        'self._file.append({"kind": "charge", **record, "attempt": attempt, "event": {**event_to_dict(event),'
        ' "noise_multiplier": 2 * getattr(event, "noise_multiplier", 1)}})',
        _LEDGER,
    ),
    Bug(
        "lines are not on disk when the permit is there",
        "privacy/ledger_file",
        "            os.fsync(self._descriptor)",
        "            pass",
        _LEDGER,
    ),
    Bug(
        "a site forgets what it answered",
        "privacy/site_ledger",
        "                self._answered |= {",
        "                self._answered &= {",
        _SITE,
    ),
    Bug(
        "a site answers for clients of others",
        "federated/remote/site",
        "        if not set(asked.clients) <= self._clients:",
        "        if False:",
        _SITE,
    ),
    Bug(
        "a site takes the server's noise multiplier",
        "federated/remote/site",
        "        if not abs(asked.noise_multiplier - own) <= _SAME * own:",
        "        if not asked.noise_multiplier <= own:",
        _SITE,
    ),
    Bug(
        "a site takes the server's clip",
        "federated/remote/site",
        "        if not query.spec.same_clip(spec):",
        "        if False:",
        _SITE,
    ),
    # --- secure aggregation -----------------------------------------------------------------------
    Bug(
        "the key of masks is constant",
        "secure_aggregation/client",
        _SECAGG_KEYS,
        "self._sealing, self._masking = KeyAgreement(), KeyAgreement(bytes(range(32)))",
        _SECURE,
    ),
    Bug(
        "the sealing key is constant",
        "secure_aggregation/client",
        _SECAGG_KEYS,
        "self._sealing, self._masking = KeyAgreement(bytes(range(32))), KeyAgreement()",
        _SECURE,
    ),
    Bug(
        "the seed of a node's own mask is constant",
        "secure_aggregation/client",
        _SECAGG_SEED,
        "self._seed = bytes(SECRET_BYTES)",
        _SECURE,
    ),
    Bug(
        "the seed of a node's own mask is its number",
        "secure_aggregation/client",
        _SECAGG_SEED,
        "self._seed = node.to_bytes(SECRET_BYTES, 'big')",
        _SECURE,
    ),
    Bug(
        "no mask of its own",
        "secure_aggregation/client",
        "apply_mask(total_V, derive_own_mask_key(settings, self._node, self._seed), 1)",
        "apply_mask(total_V.copy(), derive_own_mask_key(settings, self._node, self._seed), 1)",
        _SECURE,
    ),
    Bug(
        "a node tells the seed of a node that dropped out",
        "secure_aggregation/client",
        "node: SEED_SHARE + seed if node in self._survivors else KEY_SHARE + key",
        "node: SEED_SHARE + seed if node in self._survivors else KEY_SHARE + seed",
        _SECURE,
    ),
    Bug(
        "a node unmasks a sum of too few clients",
        "secure_aggregation/client",
        "        if clients < self._settings.least_clients:",
        "        if clients < 1:",
        _SECURE,
    ),
    Bug(
        "a node believes keys that nobody signed",
        "secure_aggregation/client",
        "            if not is_signed(settings.roster[node], signature, digest_keys(settings, node, keys)):",
        "            if not signature:",
        _SECURE,
    ),
    Bug(
        "a node takes two stories about who is in the sum",
        "secure_aggregation/client",
        "            if not is_signed(self._settings.roster[node], signature, text):",
        "            if not signature:",
        _SECURE,
    ),
    Bug(
        "fewer shares give the secret",
        "secure_aggregation/shamir",
        "*(secrets.randbelow(_PRIME) for _ in range(threshold - 1))]",
        "*(secrets.randbelow(_PRIME) for _ in range(threshold - 2)), 0]",
        _SECURE,
    ),
    Bug(
        "the polynomial's coefficients are small",
        "secure_aggregation/shamir",
        "*(secrets.randbelow(_PRIME) for _ in range(threshold - 1))]",
        "*(secrets.randbelow(2**16) for _ in range(threshold - 1))]",
        _SECURE,
    ),
    Bug(
        "all masks of a pair are the same in every round",
        "secure_aggregation/crypto",
        "salt=context, info=purpose)",
        "salt=bytes(32), info=purpose)",
        _SECURE,
    ),
    Bug(
        "masks hide the low 16 bits only",
        "secure_aggregation/crypto",
        'words = np.frombuffer(stream.update(bytes(4 * part.size)), dtype="<u4")',
        'words = np.frombuffer(stream.update(bytes(4 * part.size)), dtype="<u4") & np.uint32(0xFFFF)',
        _SECURE,
    ),
    Bug(
        "a share of noise is of the clip, not of the bound after rounding",
        "secure_aggregation/quantise",
        "return math.hypot(self.share_multiplier * self.bound_steps, SMOOTHING_STD)",
        "return math.hypot(self.share_multiplier * self.clip_steps, SMOOTHING_STD)",
        _SECURE,
    ),
    Bug(
        "no share of noise is added",
        "secure_aggregation/quantise",
        "return self.to_residues(self.round_code(code_V, words) + noise_V)",
        "return self.to_residues(self.round_code(code_V, words) + 0 * noise_V)",
        _SECURE,
    ),
    Bug(
        "discrete noise has one sign",
        "secure_aggregation/discrete",
        "return magnitude * (1 - 2 * signs)",
        "return magnitude * (1 - 0 * signs)",
        _SECURE,
    ),
    Bug(
        "a code may be longer after rounding than the bound",
        "secure_aggregation/quantise",
        "            if int(np.dot(rounded_V, rounded_V)) <= limit:",
        "            if int(np.dot(rounded_V, rounded_V)) <= 4 * limit:",
        _SECURE,
    ),
    # --- one client must not move another ----------------------------------------------------------
    Bug(
        "one dropout mask for all",
        "models/cohort_training",
        'torch.Generator(lora.device).manual_seed(derive_seed(seed, "dropout")) for seed in seeds]',
        'torch.Generator(lora.device).manual_seed(derive_seed(sum(seeds), "dropout")) for seed in seeds]',
        _ALONE,
    ),
    Bug(
        "texts are padded to the longest of the batch",
        "models/cohort_training",
        "shape = (*map(len, steps), -(-longest // _LENGTH_STEP) * _LENGTH_STEP)",
        "shape = (*map(len, steps), max(len(e.tokens) for c in schedules for s in c for e in s))",
        _ALONE,
    ),
    Bug(
        "losses are averaged over all clients' tokens",
        "models/cohort_training",
        "            (loss_K / total_K).sum().backward()",
        "            (loss_K / total_K.float().mean()).sum().backward()",
        _ALONE,
    ),
    Bug(
        "the order of an owner's records follows the file's other records",
        "data/sources",
        "owners[record[field]].append((_hash_to_unit(seed, content, copies[content]), index))",
        "owners[record[field]].append((_hash_to_unit(seed + len(records), content, copies[content]), index))",
        _ALONE,
    ),
    Bug(
        "an encoder's products are over all rows of a batch",
        "federated/query",
        "return torch.cat([self.encoder.encode(update_1D, self.spec.seed) for update_1D in update_ND.split(1)])",
        "return self.encoder.encode(update_ND - update_ND.mean(0), self.spec.seed)",
        _ALONE,
    ),
    Bug(
        "the base's products mix clients",
        "models/lora",
        "            if not self._isolated:",
        "            if True:",
        _ALONE,
    ),
    # --- what is told -----------------------------------------------------------------------------
    Bug(
        "the size of a secret cohort is told with the release",
        "privacy/mechanism",
        "return Release(value_V.to(torch.float32), noise_std, permit.slot, bounded.clip_l2, token=_TOKEN)",
        "return Release(value_V.to(torch.float32), noise_std, permit.slot, bounded.clip_l2, bounded.contributors, token=_TOKEN)",
        (*_MECHANISM, *_RUN),
    ),
    Bug(
        "realised bytes tell the size of a secret cohort",
        "runs/asking",
        "    return round(expected_cohort * query.spec.wire.message_size)",
        "    return result.bytes_up",
        _RUN,
    ),
    Bug(
        "a count of broken updates leaves under local trust",
        "federated/round",
        'nonfinite = 0 if permit.trust == "local" else clipped.nonfinite',
        "nonfinite = clipped.nonfinite",
        _ROUND,
    ),
    Bug(
        "the next clip follows the realised cohort",
        "federated/adaptive_clip",
        "balance = float(sum_V[-1]) / (NORM_BIT_WEIGHT * self.clip_l2 * expected_cohort)",
        "balance = float(sum_V[-1]) / (NORM_BIT_WEIGHT * self.clip_l2 * max(1.0, float(sum_V.abs().max())))",
        _ROUND,
    ),
    Bug(
        "the norm bit is outside of the bound",
        "federated/adaptive_clip",
        "return self.clip_l2 * math.sqrt(1.0 + NORM_BIT_WEIGHT**2)",
        "return self.clip_l2",
        _ROUND,
    ),
    Bug(
        "the statement gives the server the public's epsilon",
        "runs/certificate",
        "cost = seen[plan.budget_observer]",
        'cost = seen["public"]',
        ("runs/test_verify.py", "runs/test_run.py"),
    ),
    Bug(
        "the statement says adding or removing where one is replaced",
        "runs/certificate",
        '"replace_one": "replacing"}[plan.relation]',
        '"replace_one": "adding or removing"}[plan.relation]',
        ("runs/test_verify.py", "runs/test_run.py"),
    ),
    Bug(
        "a replayed run calls itself private",
        "privacy/ledger",
        '"private": self.plan.noise == "secure" and not self.plan.non_private,',
        '"private": not self.plan.non_private,',
        _LEDGER,
    ),
    Bug(
        "the server's evaluation text is the clients' own",
        "data/embedded_world/world",
        "rng, _HELD_OUT)]",
        "rng, _CLIENTS)]",
        ("data", "runs/test_run.py"),
    ),
    Bug(
        "records that are set aside are clients' records, too",
        "data/sources",
        "if place >= bound]",
        "if place >= 0]",
        ("data", "runs/test_evaluation_data.py"),
    ),
    Bug(
        "the number of an owner's records decides whether it is set aside",
        "data/sources",
        'f"owner {name}", 0)',
        'f"owner {name}", len(owners[name]))',
        ("data", "runs/test_evaluation_data.py"),
    ),
    Bug(
        "the statement speaks of simulated owners as of people",
        "runs/certificate",
        "if private and owners == SIMULATED_OWNERS",
        "if not private and owners == SIMULATED_OWNERS",
        ("runs/test_evaluation_data.py",),
    ),
    Bug(
        "the run has learned whatever its loss",
        "evaluation/verdict",
        "if change.high < 0:",
        "if change.high < 9:",
        ("evaluation", "runs/test_evaluation_data.py"),
    ),
    Bug(
        "verify believes the event of a charge",
        "privacy/ledger_check",
        "if planned.keys() != event.keys() or not all(_same(planned[key], event[key]) for key in planned):",
        "if planned.keys() != event.keys():",
        ("privacy/test_ledger_check.py", "runs/test_verify.py"),
    ),
    Bug(
        "verify believes the number of contributors",
        "privacy/ledger_check",
        "if not 0 <= contributors <= self._sizes[slot]:",
        "if not 0 <= contributors:",
        ("privacy/test_ledger_check.py", "runs/test_verify.py"),
    ),
    Bug(
        "verify does not read the files' digests",
        "runs/verify",
        "        elif closed[name] != actual[name]:",
        "        elif False:",
        ("runs/test_verify.py",),
    ),
    Bug(
        "an exception's message reaches a site's log",
        "federated/remote/site",
        'self._say(f"failed: {type(error).__name__}")',
        'self._say(f"failed: {error}")',
        _SITE,
    ),
    Bug(
        "an exception's message reaches the screen",
        "models/client_training",
        "failure = type(error).__name__",
        "failure = str(error)",
        ("models", "cli", "test_neighbours.py"),
    ),
)
