"""How many records were left out, cut or changed on their way to tokens: for the screen of whoever holds the text, nobody else's.

Counts of clients' records depend on their text. They are said before anything is charged, of all records alike, and never go
into a file or a message that leaves.
"""

from collections.abc import Sequence

from drencoder.data.schemas import Record
from drencoder.data.sources import Source
from drencoder.data.survey import count_duplicates
from drencoder.data.tokenization import RecordTokenizer
from drencoder.data.units import file_of
from drencoder.errors import DataError

_COUNTED = 5_000  # records at most: a million would take minutes


def report_source(tokenizer: RecordTokenizer, source: Source) -> list[str]:
    """Sentences about the clients' text of a file; none where it is generated or at other machines.

    Raises:
      DataError: the chat template refuses a record.
    """
    file = file_of(source)
    if file is None:
        return []
    used = sorted(index for owned in file.owned for index in owned[: file.examples_per_client])
    sentences = [report_records(tokenizer, [(index + 1, file.records[index]) for index in used], "The clients' text")]
    if file.changed:
        sentences.append(
            f"Records with characters or messages that are no text, which were replaced or left out: {file.changed:,}."
        )
    twice = count_duplicates(file, ()).across_owners
    if twice:
        sentences.append(f"Texts that several clients have word for word: {twice:,}.")
    return sentences


def report_records(tokenizer: RecordTokenizer, records: Sequence[tuple[int, Record]], whose: str) -> str:
    """What becomes of records, each with its number; of very many, records at even distances are looked at.

    Raises:
      DataError: the chat template refuses a record; the message has its number.
    """
    step = -(-len(records) // _COUNTED) or 1
    looked_at = records[::step]
    empty = cut = marked = 0
    for number, record in looked_at:
        try:
            tokenised = tokenizer.tokenise(record)
        except DataError as error:
            raise DataError(f"record {number}: {error}") from None
        empty, cut, marked = empty + (tokenised.example is None), cut + tokenised.cut, marked + tokenised.marked
    counts = [
        (empty, "left out, since they have no response"),
        (cut, f"cut to data.max_tokens = {tokenizer.max_tokens:,}"),
        (marked, "with control tokens, which stay words"),
    ]
    told = "; ".join(f"{words}: {count:,}" for count, words in counts if count)
    some = f", of which {len(looked_at):,}, at even distances, were looked at" if step > 1 else ""
    return f"{whose}: {len(records):,} records{some}; {told or 'all are used whole'}."
