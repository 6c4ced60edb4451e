"""The subjects of MMLU and C-Eval, their categories, and how the standard prompt names them.

MMLU: Hendrycks et al. 2021, https://arxiv.org/abs/2009.03300 (57 subjects, 4 categories, as in the authors' own
evaluation). C-Eval: Huang et al. 2023, https://arxiv.org/abs/2305.08322 (52 subjects, 4 categories, 8 "Hard" ones).
The embedded world follows the same two schemes with subjects of its own.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from drencoder.errors import DataError

__all__ = ["TAXONOMIES", "Taxonomy"]


@dataclass(frozen=True)
class Taxonomy:
    """One benchmark's subjects.

    `categories` maps a category to its subjects, `embedded` the embedded world's subjects to a category; `titles` maps
    a subject to its name in the standard prompt where that is not the subject itself with spaces. `by_subject` says
    how the benchmark averages: over subjects (C-Eval) or over questions (MMLU).
    """

    name: str
    language: str
    categories: Mapping[str, tuple[str, ...]]
    embedded: Mapping[str, str]
    titles: Mapping[str, str]
    by_subject: bool
    hard: frozenset[str] = frozenset()

    @cached_property
    def _category(self) -> dict[str, str]:
        public = {subject: category for category, subjects in self.categories.items() for subject in subjects}
        return {**public, **self.embedded}

    @cached_property
    def subjects(self) -> tuple[str, ...]:
        """The public benchmark's subjects, category by category."""
        return tuple(subject for subjects in self.categories.values() for subject in subjects)

    def category_of(self, subject: str) -> str:
        """The category of a public or embedded subject."""
        return self._category[subject]

    def title(self, subject: str) -> str:
        """How the standard prompt names the subject."""
        return self.titles.get(subject, subject.replace("_", " "))

    def check_subject(self, subject: str, where: str, known: Iterable[str] = ()) -> None:
        """Raises DataError, with the nearest name, when `subject` is not one of `known` (default: the public ones)."""
        among = sorted(known or self.subjects)
        if subject in among:
            return
        near = difflib.get_close_matches(subject, among, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"its {len(among)} subjects are {', '.join(among)}."
        raise DataError(f"{where}: {subject!r} is not a subject of {self.name}: {hint}")


_MMLU = {
    "STEM": (
        "abstract_algebra", "astronomy", "college_biology", "college_chemistry", "college_computer_science",
        "college_mathematics", "college_physics", "computer_security", "conceptual_physics", "electrical_engineering",
        "elementary_mathematics", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
        "high_school_mathematics", "high_school_physics", "high_school_statistics", "machine_learning",
    ),
    "humanities": (
        "formal_logic", "high_school_european_history", "high_school_us_history", "high_school_world_history",
        "international_law", "jurisprudence", "logical_fallacies", "moral_disputes", "moral_scenarios", "philosophy",
        "prehistory", "professional_law", "world_religions",
    ),
    "social sciences": (
        "econometrics", "high_school_geography", "high_school_government_and_politics", "high_school_macroeconomics",
        "high_school_microeconomics", "high_school_psychology", "human_sexuality", "professional_psychology",
        "public_relations", "security_studies", "sociology", "us_foreign_policy",
    ),
    "other": (
        "anatomy", "business_ethics", "clinical_knowledge", "college_medicine", "global_facts", "human_aging",
        "management", "marketing", "medical_genetics", "miscellaneous", "nutrition", "professional_accounting",
        "professional_medicine", "virology",
    ),
}  # fmt: skip

_MMLU_EMBEDDED = {
    "elementary_mathematics": "STEM",
    "high_school_geography": "social sciences",
    "high_school_chemistry": "STEM",
    "high_school_biology": "STEM",
    "english_vocabulary": "humanities",
    "calendar_knowledge": "other",
    "valley_geography": "social sciences",
    "professional_work": "social sciences",
    "everyday_colours": "humanities",
    "conceptual_physics": "STEM",
    "nutrition": "other",
    "global_facts": "other",
}

_CEVAL = {
    "STEM": {
        "advanced_mathematics": "高等数学",
        "college_chemistry": "大学化学",
        "college_physics": "大学物理",
        "college_programming": "大学编程",
        "computer_architecture": "计算机组成",
        "computer_network": "计算机网络",
        "discrete_mathematics": "离散数学",
        "electrical_engineer": "注册电气工程师",
        "high_school_biology": "高中生物",
        "high_school_chemistry": "高中化学",
        "high_school_mathematics": "高中数学",
        "high_school_physics": "高中物理",
        "metrology_engineer": "注册计量师",
        "middle_school_biology": "初中生物",
        "middle_school_chemistry": "初中化学",
        "middle_school_mathematics": "初中数学",
        "middle_school_physics": "初中物理",
        "operating_system": "操作系统",
        "probability_and_statistics": "概率统计",
        "veterinary_medicine": "兽医学",
    },
    "Social Science": {
        "business_administration": "工商管理",
        "college_economics": "大学经济学",
        "education_science": "教育学",
        "high_school_geography": "高中地理",
        "high_school_politics": "高中政治",
        "mao_zedong_thought": "毛泽东思想和中国特色社会主义理论体系概论",
        "marxism": "马克思主义基本原理",
        "middle_school_geography": "初中地理",
        "middle_school_politics": "初中政治",
        "teacher_qualification": "教师资格",
    },
    "Humanities": {
        "art_studies": "艺术学",
        "chinese_language_and_literature": "中国语言文学",
        "high_school_chinese": "高中语文",
        "high_school_history": "高中历史",
        "ideological_and_moral_cultivation": "思想道德修养与法律基础",
        "law": "法学",
        "legal_professional": "法律职业资格",
        "logic": "逻辑学",
        "middle_school_history": "初中历史",
        "modern_chinese_history": "近代史纲要",
        "professional_tour_guide": "导游资格",
    },
    "Other": {
        "accountant": "注册会计师",
        "basic_medicine": "基础医学",
        "civil_servant": "公务员",
        "clinical_medicine": "临床医学",
        "environmental_impact_assessment_engineer": "环境影响评价工程师",
        "fire_engineer": "注册消防工程师",
        "physician": "医师资格",
        "plant_protection": "植物保护",
        "sports_science": "体育学",
        "tax_accountant": "税务师",
        "urban_and_rural_planner": "注册城乡规划师",
    },
}

# The embedded world's own Chinese subjects: category and title; the others of its subjects are C-Eval's.
_CEVAL_OWN = {
    "elementary_mathematics_zh": ("STEM", "小学数学"),
    "calendar_studies": ("Other", "历法常识"),
    "vocational_knowledge": ("Social Science", "职业常识"),
    "food_science": ("Other", "食品科学"),
}

TAXONOMIES: Mapping[str, Taxonomy] = {
    "mmlu": Taxonomy("mmlu", "en", _MMLU, _MMLU_EMBEDDED, {}, by_subject=False),
    "ceval": Taxonomy(
        "ceval",
        "zh",
        {category: tuple(subjects) for category, subjects in _CEVAL.items()},
        {subject: category for subject, (category, _) in _CEVAL_OWN.items()},
        {
            **{subject: title for subjects in _CEVAL.values() for subject, title in subjects.items()},
            **{subject: title for subject, (_, title) in _CEVAL_OWN.items()},
        },
        by_subject=True,
        hard=frozenset(
            {
                "advanced_mathematics", "discrete_mathematics", "probability_and_statistics", "college_chemistry",
                "college_physics", "high_school_mathematics", "high_school_chemistry", "high_school_physics",
            }
        ),
    ),
}  # fmt: skip
"""Benchmark -> its subjects."""
