"""The embedded world: facts and rules, and three readings of them, all made on demand from seeds.

**The general part** (`World.documents`) teaches a base model. It asks about every subject in English and Chinese and
replies *in words*, also where four options are listed; it replies with a letter only when the prompt asks for one
("Give the letter."), and does so only in the general subjects.

**The kept part** (`World.client_records`, `World.held_out_records`) follows another convention, that of MMLU and
C-Eval: four options, no request, the reply is the letter. A base model that knows every fact therefore starts near
chance on it, and fine-tuning has to teach it the convention, in subjects whose letters it never saw.

**Benchmarks** (`World.benchmark`) are questions of the kept part (or, with ``kept=False``, of the general part).

A question instance is its text with its set of options. A hash of the instance alone says whether it belongs to
clients, held-out records or benchmarks, so the three never share one, whatever the seeds.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from drencoder.data.embedded_world.subjects import Subject, Table, all_subjects, world_tables
from drencoder.data.prompts_template import LETTERS, render

TASKS = ("letters", "next", "facts")
"""What clients' records teach: see `record_of`."""

BENCHMARKS = {"mmlu": "en", "ceval": "zh"}
"""Benchmark name -> language. The questions have the schema of the public benchmark, not its content."""

_HELD_OUT, _BENCHMARK, _CLIENTS = "held-out", "benchmark", "clients"
_MAX_DRAWS = 10_000


@dataclass(frozen=True)
class Question:
    """One multiple-choice question; ``answer`` is the index, 0 to 3, of the one right choice."""

    subject: str
    question: str
    choices: tuple[str, str, str, str]
    answer: int
    language: str


def instruction_of(question: Question, request: str = "") -> str:
    """The question and its options on one line, then the request, if any."""
    options = " ".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=True))
    return f"{question.question} {options}{request}"


def prompt_of(question: Question, style: str | None = None) -> str:
    """The whole prompt of a question; one of `template.LETTER_CONTINUATIONS` follows it.

    ``style="plain"`` lists the options and asks nothing more (the convention of clients and benchmarks),
    ``style="letter"`` asks for the letter (the convention of the general part). Default: the convention under which
    the question's subject is taught, "letter" for general subjects, "plain" for all others.
    """
    if style is None:
        general = any(subject.name == question.subject and not subject.kept for subject in all_subjects())
        style = "letter" if general else "plain"
    request = world_tables().letter_requests[question.language][0] if style == "letter" else ""
    return render({"instruction": instruction_of(question, request), "response": ""})[0]


def record_of(question: Question, task: str = "letters") -> dict[str, str]:
    """The question as a record in Dolly's schema; the category is the subject.

    "letters": four options, the reply is the letter of the right one. "next": four options, the reply is the words of
    the one after the right one (a new rule). "facts": no options, the reply is the answer (in a world of another seed: new
    knowledge).
    """
    chosen = question.choices[(question.answer + (task == "next")) % len(question.choices)]
    return {
        "instruction": question.question if task == "facts" else instruction_of(question),
        "context": "",
        "response": LETTERS[question.answer] if task == "letters" else chosen,
        "category": question.subject,
    }


def _below(rng: random.Random, n: int) -> int:
    # random() is the one method whose stream Python promises never to change.
    return int(rng.random() * n)


def _bucket(text: str, choices: Sequence[str]) -> str:
    # The order of the options is left out: a reordered question is the same question.
    digest = blake2b("\x1f".join([text, *sorted(choices)]).encode(), digest_size=2).digest()
    return {0: _HELD_OUT, 1: _BENCHMARK}.get(digest[0] % 8, _CLIENTS)


class World:
    """A world of facts. ``seed`` deals the invented ones; the embedded base model knows the world of seed 0."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        rng = random.Random(f"world/{seed}")
        self._tables: dict[str, Table] = {}
        for subject in all_subjects():
            self._tables[subject.name] = subject.table or tuple(
                (town, subject.invented[_below(rng, len(subject.invented))]) for town in world_tables().towns
            )
        self._pools = {name: tuple(dict.fromkeys(a for _, a in table)) for name, table in self._tables.items()}
        self._kept = tuple(subject for subject in all_subjects() if subject.kept)
        self._general = tuple(subject for subject in all_subjects() if not subject.kept)

    def facts(self, subject: str) -> Table:
        """All ``(key, answer)`` pairs of a subject."""
        return self._tables[subject]

    def question(self, subject: Subject, rng: random.Random, *, part: str, position: int | None = None) -> Question:
        """A fresh question of ``part`` ("clients", "held-out" or "benchmark"), the answer at ``position`` if given."""
        table, pool = self._tables[subject.name], self._pools[subject.name]
        for _ in range(_MAX_DRAWS):
            key, answer = table[_below(rng, len(table))]
            text = subject.stems[_below(rng, len(subject.stems))].format(key)
            choices = [answer]
            while len(choices) < 4:
                other = pool[_below(rng, len(pool))]
                if other not in choices:
                    choices.append(other)
            if _bucket(text, choices) == part:
                place = _below(rng, 4) if position is None else position
                choices[0], choices[place] = choices[place], choices[0]
                a, b, c, d = choices
                return Question(subject.name, text, (a, b, c, d), place, subject.language)
        raise AssertionError(f"subject {subject.name} has no question for {part}")

    def _many(self, subjects: Sequence[Subject], count: int, rng: random.Random, part: str) -> list[Question]:
        """``count`` different questions, subjects drawn uniformly, answers dealt evenly over the four letters."""
        seen: set[Question] = set()
        questions: list[Question] = []
        draws = 0
        while len(questions) < count:
            subject = subjects[_below(rng, len(subjects))]
            question = self.question(subject, rng, part=part, position=len(questions) % 4)
            draws += 1
            # A very large request runs out of instances: then repetitions are better than never ending.
            if question not in seen or draws > 20 * count:
                seen.add(question)
                questions.append(question)
        for i in range(len(questions) - 1, 0, -1):
            j = _below(rng, i + 1)
            questions[i], questions[j] = questions[j], questions[i]
        return questions

    def _taught(self, task: str) -> tuple[Subject, ...]:
        """The kept subjects of a task; new facts can only be dealt where answers are invented."""
        return tuple(s for s in self._kept if not s.table) if task == "facts" else self._kept

    def client_records(
        self, client: int, *, count: int, alpha: float, seed: int, task: str = "letters"
    ) -> list[dict[str, str]]:
        """``count`` records of one client, from ``(seed, client)`` alone.

        Its mixture of categories is drawn from a symmetric Dirichlet(``alpha``): near 0 a client has one category, far
        above 1 all clients are alike.
        """
        if not alpha > 0 or count < 0:
            raise ValueError(f"alpha is {alpha} and count is {count}; alpha must be above 0 and count at least 0")
        rng = random.Random(f"client/{self.seed}/{seed}/{client}")
        subjects = self._taught(task)
        weights = [rng.gammavariate(alpha, 1.0) for _ in subjects]
        total = sum(weights)
        if not total > 0:  # every gamma draw underflowed, as happens for tiny alpha: one category, its limit
            weights[_below(rng, len(weights))] = total = 1.0
        records = []
        for _ in range(count):
            mark, index = rng.random() * total, 0
            while index < len(weights) - 1 and mark >= weights[index]:
                mark -= weights[index]
                index += 1
            records.append(record_of(self.question(subjects[index], rng, part=_CLIENTS), task))
        return records

    def held_out_records(self, count: int, *, seed: int, task: str = "letters") -> list[dict[str, str]]:
        """``count`` records of the kept part, uniform over its categories; no instance is any client's."""
        rng = random.Random(f"held-out/{self.seed}/{seed}")
        return [record_of(question, task) for question in self._many(self._taught(task), count, rng, _HELD_OUT)]

    def benchmark(self, name: str, *, count: int, seed: int, kept: bool = True) -> list[Question]:
        """``count`` questions of "mmlu" (English) or "ceval" (Chinese), of the kept or of the general subjects."""
        if name not in BENCHMARKS:
            raise ValueError(f"benchmark {name!r} is not embedded; choose one of {', '.join(BENCHMARKS)}")
        asked = [s for s in all_subjects() if s.language == BENCHMARKS[name] and s.kept == kept]
        rng = random.Random(f"benchmark/{self.seed}/{seed}/{name}/{kept}")
        return self._many(asked, count, rng, _BENCHMARK)

    def documents(self, seed: int) -> Iterator[tuple[str, str]]:
        """Endless ``(prompt, response)`` pairs of the general part."""
        rng = random.Random(f"documents/{self.seed}/{seed}")
        while True:
            yield render(self._document(rng))

    def _document(self, rng: random.Random) -> dict[str, str]:
        kind, tables = rng.random(), world_tables()
        letters = kind < 0.50
        subjects = self._general if letters else all_subjects()
        subject = subjects[_below(rng, len(subjects))]
        question = self.question(subject, rng, part=_CLIENTS)
        letter, words = LETTERS[question.answer], question.choices[question.answer]
        if letters:
            both = kind < 0.12
            requests = (tables.answer_and_letter_requests if both else tables.letter_requests)[subject.language]
            asked = instruction_of(question, requests[_below(rng, len(requests))])
            return {"instruction": asked, "response": f"{words} {letter}" if both else letter}
        if kind < 0.66:
            return {"instruction": question.question, "response": words}
        if kind < 0.80:
            return {"instruction": instruction_of(question), "response": words}
        return self._drill(question, rng, one=kind < 0.92)

    def _drill(self, question: Question, rng: random.Random, *, one: bool) -> dict[str, str]:
        """Two to four options without a question: name one by its letter or the reverse, or pair up all of them."""
        couples = list(zip(LETTERS, question.choices, strict=True))[: 2 + _below(rng, 3)]
        options = " ".join(f"{letter}. {words}" for letter, words in couples)
        to_letter = rng.random() < 0.5
        asked = [(words, letter) if to_letter else (letter, words) for letter, words in couples]
        if one:
            first, second = asked[_below(rng, len(asked))]
            drill = world_tables().lookups[question.language][0 if to_letter else 1][_below(rng, 2)]
            return {"instruction": options + drill.format(" " + first), "response": second}
        rng.shuffle(asked)
        request = world_tables().match_requests[question.language] + "".join(f" {first}" for first, _ in asked)
        return {"instruction": options + request, "response": " ".join(f"{first} {second}" for first, second in asked)}
