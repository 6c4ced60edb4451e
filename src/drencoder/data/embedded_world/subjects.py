"""The subjects of the embedded world: which facts, in which words, and which subjects are kept for the clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from drencoder.data.embedded_world import world_facts as facts

Table = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Subject:
    """One subject: its name, language (``"en"`` | ``"zh"``), question stems with one ``{}``, and its facts.

    ``kept``: questions of this subject are never asked for a letter in the general part; clients and benchmarks have
    them. ``table`` is empty for an invented subject, whose facts each ``World`` deals from ``invented``.
    """

    name: str
    language: str
    kept: bool
    stems: tuple[str, ...]
    table: Table = ()
    invented: tuple[str, ...] = ()


def _sums(word: str) -> Table:
    return tuple((f"{a}{word}{b}", str(a + b)) for a in range(1, 10) for b in range(1, 10))


def _next(names: Sequence[str]) -> Table:
    return tuple((name, names[(i + 1) % len(names)]) for i, name in enumerate(names))


SUBJECTS: tuple[Subject, ...] = (
    # English, general.
    Subject(
        "elementary_mathematics",
        "en",
        False,
        ("What is {}?", "How much is {}?", "Find {}."),
        _sums(" plus "),
    ),
    Subject(
        "high_school_geography",
        "en",
        False,
        ("What is the capital of {}?", "Which city is the capital of {}?", "Name the capital of {}."),
        facts.CAPITALS,
    ),
    Subject(
        "high_school_chemistry",
        "en",
        False,
        ("What is the symbol of {}?", "Which symbol stands for {}?", "Name the symbol of {}."),
        facts.ELEMENTS,
    ),
    Subject(
        "high_school_biology",
        "en",
        False,
        ("What kind of animal is the {}?", "To which class belongs the {}?", "Name the class of the {}."),
        facts.ANIMALS,
    ),
    Subject(
        "english_vocabulary",
        "en",
        False,
        ("What is the opposite of {}?", "Which word means not {}?", "Name the opposite of {}."),
        facts.OPPOSITES,
    ),
    Subject(
        "calendar_knowledge",
        "en",
        False,
        ("What comes after {}?", "Which one follows {}?", "Name the one after {}."),
        _next(facts.DAYS) + _next(facts.MONTHS),
    ),
    Subject(
        "valley_geography",
        "en",
        False,
        ("Which river runs through {}?", "On which river lies {}?", "Name the river of {}."),
        invented=facts.RIVERS,
    ),
    # English, kept.
    Subject(
        "professional_work",
        "en",
        True,
        ("Who works in a {}?", "Which person belongs to a {}?", "Name the worker of a {}."),
        facts.JOBS,
    ),
    Subject(
        "everyday_colours",
        "en",
        True,
        ("What is the colour of {}?", "Which colour is typical of {}?", "Name the colour of {}."),
        facts.COLOURS,
    ),
    Subject(
        "conceptual_physics",
        "en",
        True,
        ("What is the unit of {}?", "Which unit measures {}?", "Name the unit of {}."),
        facts.UNITS,
    ),
    Subject(
        "nutrition",
        "en",
        True,
        ("What kind of food is {}?", "To which food group belongs {}?", "Name the food group of {}."),
        facts.FOODS,
    ),
    Subject(
        "global_facts",
        "en",
        True,
        ("What is made in {}?", "Which goods come from {}?", "Name the goods of {}."),
        invented=facts.WARES,
    ),
    # Chinese, general.
    Subject(
        "elementary_mathematics_zh",
        "zh",
        False,
        ("{}等于几？", "{}是多少？", "请算出{}。"),
        _sums("加"),
    ),
    Subject(
        "middle_school_geography",
        "zh",
        False,
        ("{}的首都是哪里？", "哪个城市是{}的首都？", "请说出{}的首都。"),
        facts.CAPITALS_ZH,
    ),
    Subject(
        "middle_school_chemistry",
        "zh",
        False,
        ("{}的元素符号是什么？", "哪个符号代表{}？", "请说出{}的元素符号。"),
        facts.ELEMENTS_ZH,
    ),
    Subject(
        "middle_school_biology",
        "zh",
        False,
        ("{}是什么动物？", "{}属于哪一类？", "请说出{}的类别。"),
        facts.ANIMALS_ZH,
    ),
    Subject(
        "high_school_chinese",
        "zh",
        False,
        ("{}的反义词是什么？", "哪个词与{}相反？", "请说出{}的反义词。"),
        facts.OPPOSITES_ZH,
    ),
    Subject(
        "calendar_studies",
        "zh",
        False,
        ("{}之后是什么？", "哪个在{}之后？", "请说出{}的下一个。"),
        _next(facts.DAYS_ZH) + _next(facts.MONTHS_ZH),
    ),
    # Chinese, kept.
    Subject(
        "vocational_knowledge",
        "zh",
        True,
        ("谁在{}工作？", "哪种人属于{}？", "请说出{}的工作者。"),
        facts.JOBS_ZH,
    ),
    Subject(
        "art_studies",
        "zh",
        True,
        ("{}是什么颜色？", "哪种颜色属于{}？", "请说出{}的颜色。"),
        facts.COLOURS_ZH,
    ),
    Subject(
        "middle_school_physics",
        "zh",
        True,
        ("{}的单位是什么？", "哪个单位测量{}？", "请说出{}的单位。"),
        facts.UNITS_ZH,
    ),
    Subject(
        "food_science",
        "zh",
        True,
        ("{}是什么食物？", "{}属于哪类食物？", "请说出{}的食物类别。"),
        facts.FOODS_ZH,
    ),
    Subject(
        "chinese_language_and_literature",
        "zh",
        True,
        ("{}的量词是什么？", "哪个量词用于{}？", "请说出{}的量词。"),
        facts.MEASURE_WORDS_ZH,
    ),
)

LETTER_REQUESTS = {
    "en": (" Give the letter.", " Reply with the letter.", " Which letter?"),
    "zh": (" 请答字母。", " 只写字母。", " 选哪个字母？"),
}
"""Only after one of these does the general part expect a letter; without one it expects words."""

ANSWER_AND_LETTER_REQUESTS = {"en": (" Give answer and letter.",), "zh": (" 请答答案和字母。",)}
"""After one of these the general part expects the words and then the letter."""

MATCH_REQUESTS = {"en": " Match:", "zh": " 配对："}
"""Drill over a list of options: write each of the named ones with its partner."""

LOOKUPS = {
    "en": ((" Which letter is{}?", " Find the letter of{}."), (" What is{}?", " Name option{}.")),
    "zh": ((" 哪个字母是{}？", " 请找出{}的字母。"), ("{}是什么？", " 请说出选项{}。")),
}
"""Drills over a list of options without a question: option -> letter, and letter -> option."""

WORDS_ZH = [
    "等于几",
    "是",
    "多少",
    "请",
    "算出",
    "加",
    "的",
    "首都",
    "哪里",
    "哪个",
    "城市",
    "请说出",
    "元素",
    "符号",
    "什么",
    "代表",
    "动物",
    "属于",
    "哪",
    "一",
    "类",
    "类别",
    "反义词",
    "词",
    "与",
    "相反",
    "之后",
    "在",
    "下一个",
    "谁",
    "工作",
    "哪种",
    "人",
    "工作者",
    "颜色",
    "单位",
    "测量",
    "食物",
    "哪类",
    "量词",
    "用于",
    "请答",
    "字母",
    "只写",
    "选",
    "请找出",
    "选项",
    "配对",
    "和",
    "问题",
    "答案",
    "回答",
    "小",
    "有",
    "个",
    "只",
    "他",
    "她",
]
"""Chinese words of the stems; written Chinese has no spaces to find them by."""
