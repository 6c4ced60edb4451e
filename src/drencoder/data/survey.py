"""What is in the clients' data, read before a run: how many records, owners and tokens, and what is in them twice. No torch."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from drencoder.data.evaluation_text import open_evaluation, set_aside_share
from drencoder.data.owners import owner_of
from drencoder.data.prompts_template import PlainTemplate
from drencoder.data.sources import FileSource, Record, Source
from drencoder.data.units import FileUnits, file_of, open_text
from drencoder.recipe.recipe import Recipe

_BYTES_OF_A_TOKEN = 4  # of UTF-8, over many languages and tokenizers; good to a third
_COUNTED_BYTES = 4_000_000  # of a larger file, tokens are counted in records at even distances
CountTokens = Callable[[list[str]], list[int]]


@dataclass(frozen=True)
class Duplicates:
    """Texts that are there more than once, word for word: what is learned of one owner is then known of others."""

    across_owners: int  # different texts that more than one client has
    in_evaluation: int  # different texts of clients that the evaluation data have, too


@dataclass(frozen=True)
class DataSurvey:
    """Counts of a file's text. They are facts of the machine that reads it, for its own screen only."""

    source: str
    schema: str
    records: int
    clients: int
    clients_are: str  # whom a client stands for, in words
    records_of_client: tuple[int, int, int]  # fewest, median, most; of a site, where the unit is inside one
    owners: int | None  # of data.owner_field, counted at each client (or site) by itself; None = no such field
    shared_owners: int  # names in data.owner_field that more than one client (or site) has
    evaluation_records: int
    tokens: int
    tokens_are: str  # how they were counted, in words
    too_long: int  # records of more tokens than data.max_tokens
    empty: int  # records without a response
    changed: int
    duplicates: Duplicates

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def with_population(recipe: Recipe) -> Recipe:
    """The recipe with `federation.population` set: where it is not named, as many clients (or sites) as the data have.

    Raises:
      DataError: the data cannot be read.
    """
    if recipe.federation.population:
        return recipe
    source = open_text(recipe, set_aside=set_aside_share(recipe), count=True)
    if isinstance(source, FileUnits):
        return recipe.changed({"federation.population": len(source.sites)})
    assert isinstance(source, FileSource)  # the embedded world has a number of its own
    return recipe.changed({"federation.population": len(source.owned)})


def survey_data(recipe: Recipe, tokenizer: Path | None) -> DataSurvey | None:
    """Reads the clients' data; None for the embedded world, whose clients are made on demand.

    Args:
      recipe: with its population set.
      tokenizer: a tokenizer.json; None = the number of tokens is an estimate.

    Raises:
      DataError: the data cannot be read.
    """
    clients_text = open_text(recipe, set_aside=set_aside_share(recipe))
    source = file_of(clients_text)
    if source is None:
        return None
    evaluation = open_evaluation(recipe, clients_text)
    measured = evaluation(recipe.evaluation.examples) if evaluation else []
    texts = [PlainTemplate().render(record).text for record in source.records]
    tokens, tokens_are, too_long = _count_tokens(texts, _load_counter(tokenizer), recipe.data.max_tokens)
    groups = _records_by_client(clients_text, source)
    sizes = sorted(map(len, groups))
    field, curated = recipe.data.client_field, recipe.privacy.unit != "client"
    owners, shared_owners = _count_owners(source, groups, recipe.data.owner_field, recipe.data.source)
    return DataSurvey(
        source=source.provenance,
        schema=source.schema,
        records=len(source.records),
        clients=len(groups),
        clients_are=f"{'sites' if curated else 'owners'} in {field!r}" if field else "simulated",
        records_of_client=(sizes[0], sizes[len(sizes) // 2], sizes[-1]) if sizes else (0, 0, 0),
        owners=owners,
        shared_owners=shared_owners,
        evaluation_records=len(measured),
        tokens=tokens,
        tokens_are=tokens_are,
        too_long=too_long,
        empty=sum(not record["response"].strip() for record in source.records),
        changed=source.changed,
        duplicates=count_duplicates(source, measured),
    )


def _records_by_client(clients_text: Source, file: FileSource) -> list[list[int]]:
    """The numbers of each client's records, or of each site's where the unit is inside one."""
    if not isinstance(clients_text, FileUnits):
        return [list(indices) for indices in file.owned]
    return [
        [index for unit in units for index in file.owned[clients_text.places[unit]]]
        for units in clients_text.sites.values()
    ]


def _count_owners(file: FileSource, groups: Sequence[Sequence[int]], field: str, where: str) -> tuple[int | None, int]:
    """How many owners there are, at each client (or site) by itself, and how many names more than one of them has.

    Raises DataError for a record that names no owner.
    """
    if not field:
        return None, 0
    named = [
        {owner_of(file.records[index], index + 1, field, "data.owner_field", where) for index in group}
        for group in groups
    ]
    places = Counter(name for names in named for name in names)
    return places.total(), sum(count > 1 for count in places.values())


def count_duplicates(source: FileSource, evaluation: Sequence[Record]) -> Duplicates:
    """Counts different texts that more than one client has, or a client and the evaluation data."""
    owners: dict[bytes, set[int]] = defaultdict(set)
    for client, indices in enumerate(source.owned):
        for index in indices:
            owners[_digest(source.records[index])].add(client)
    shared = {_digest(record) for record in evaluation} & owners.keys()
    return Duplicates(sum(len(clients) > 1 for clients in owners.values()), len(shared))


def _digest(record: Record) -> bytes:
    return hashlib.blake2b(PlainTemplate().render(record).text.encode(), digest_size=16).digest()


def _load_counter(path: Path | None) -> CountTokens | None:
    if path is None:
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception:  # the library's own: loading the model will say what is wrong with it
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda texts: [len(one.ids) for one in tokenizer.encode_batch(texts, add_special_tokens=False)]


def _count_tokens(texts: Sequence[str], count: CountTokens | None, limit: int) -> tuple[int, str, int]:
    """Tokens of all texts, how they were counted, and how many texts have more than `limit`."""
    sizes = [len(text.encode()) for text in texts]
    step = 1 + sum(sizes) // _COUNTED_BYTES
    if count is None:
        counted: Iterable[int] = [size // _BYTES_OF_A_TOKEN for size in sizes]
        step, how = 1, f"estimated, {_BYTES_OF_A_TOKEN} bytes each"
    else:
        counted = count(list(texts[::step]))
        how = "by the model's tokenizer" if step == 1 else f"by the model's tokenizer, in one of {step} records"
    numbers = list(counted)
    scale = len(texts) / max(1, len(numbers))
    return round(sum(numbers) * scale), how, round(sum(number > limit for number in numbers) * scale)
