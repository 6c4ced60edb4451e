"""The subjects of MMLU and C-Eval and their categories, as the authors average over them.

MMLU: Hendrycks et al. 2021, https://arxiv.org/abs/2009.03300 (57 subjects, 4 categories, as in the authors' own
evaluation). C-Eval: Huang et al. 2023, https://arxiv.org/abs/2305.08322 (52 subjects, 4 categories, 8 "Hard" ones).
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from drencoder.errors import DataError
from drencoder.reading import shown


@dataclass(frozen=True)
class Taxonomy:
    """One benchmark's subjects.

    `categories` maps a category to its subjects. `by_subject` says how the benchmark averages: over subjects (C-Eval) or
    over questions (MMLU). `hard` holds C-Eval's Hard subset.
    """

    name: str
    language: str
    categories: Mapping[str, tuple[str, ...]]
    by_subject: bool
    hard: frozenset[str] = frozenset()

    @cached_property
    def subjects(self) -> tuple[str, ...]:
        """The public benchmark's subjects, category by category."""
        return tuple(subject for subjects in self.categories.values() for subject in subjects)

    def check_subject(self, subject: str, where: str, known: Iterable[str] = ()) -> None:
        """Raises DataError, with the nearest name, when `subject` is not one of `known` (default: the public ones)."""
        among = sorted(known or self.subjects)
        if subject in among:
            return
        near = difflib.get_close_matches(subject, among, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"its {len(among)} subjects are {', '.join(among)}."
        raise DataError(f"{where}: {shown(subject)} is not a subject of {self.name}: {hint}")


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

_CEVAL = {
    "STEM": (
        "advanced_mathematics", "college_chemistry", "college_physics", "college_programming",
        "computer_architecture", "computer_network", "discrete_mathematics", "electrical_engineer",
        "high_school_biology", "high_school_chemistry", "high_school_mathematics", "high_school_physics",
        "metrology_engineer", "middle_school_biology", "middle_school_chemistry", "middle_school_mathematics",
        "middle_school_physics", "operating_system", "probability_and_statistics", "veterinary_medicine",
    ),
    "Social Science": (
        "business_administration", "college_economics", "education_science", "high_school_geography",
        "high_school_politics", "mao_zedong_thought", "marxism", "middle_school_geography", "middle_school_politics",
        "teacher_qualification",
    ),
    "Humanities": (
        "art_studies", "chinese_language_and_literature", "high_school_chinese", "high_school_history",
        "ideological_and_moral_cultivation", "law", "legal_professional", "logic", "middle_school_history",
        "modern_chinese_history", "professional_tour_guide",
    ),
    "Other": (
        "accountant", "basic_medicine", "civil_servant", "clinical_medicine",
        "environmental_impact_assessment_engineer", "fire_engineer", "physician", "plant_protection",
        "sports_science", "tax_accountant", "urban_and_rural_planner",
    ),
}  # fmt: skip

TAXONOMIES: Mapping[str, Taxonomy] = {
    "mmlu": Taxonomy("mmlu", "en", _MMLU, by_subject=False),
    "ceval": Taxonomy(
        "ceval",
        "zh",
        _CEVAL,
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
