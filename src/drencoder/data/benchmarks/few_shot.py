"""How a multiple-choice question is asked: as clients' records are, or as the public benchmark is usually asked.

The letter that follows a prompt, in worked examples too, starts with a space whatever the language: that is how
clients' records are rendered (`template.render`) and what EleutherAI's lm-evaluation-harness scores for both benchmarks.
"""

from collections.abc import Sequence

from drencoder.data.benchmarks.taxonomy import TAXONOMIES
from drencoder.data.embedded_world.world import Question, prompt_of
from drencoder.data.prompts_template import LETTER_CONTINUATIONS, LETTERS

__all__ = ["TEMPLATES", "prompt_with_examples"]

TEMPLATES = ("plain", "standard")

# What opens a standard prompt, with the subject's title in it, and what closes each question (MMLU: Hendrycks et al.
# 2021; C-Eval: Huang et al. 2023, answer-only prompt).
_STANDARD = {
    "en": ("The following are multiple choice questions (with answers) about {}.", "Answer:"),
    "zh": ("以下是中国关于{}的单项选择题，请选出其中的正确答案。", "答案："),
}
_TAXONOMY = {taxonomy.language: taxonomy for taxonomy in TAXONOMIES.values()}


def prompt_with_examples(question: Question, examples: Sequence[Question] = (), template: str = "plain") -> str:
    """The whole prompt: the template's opening, if any, worked `examples` with their letters, then the question.

    One of `LETTER_CONTINUATIONS` follows it. Parts are separated by an empty line.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template is {template!r}; choose one of {', '.join(TEMPLATES)}")
    solved = [_ask(example, template) + LETTER_CONTINUATIONS[example.answer] for example in examples]
    opening = []
    if template == "standard":
        title = _TAXONOMY[question.language].title(question.subject)
        opening = [_STANDARD[question.language][0].format(title)]
    return "\n\n".join([*opening, *solved, _ask(question, template)])


def _ask(question: Question, template: str) -> str:
    if template == "plain":
        return prompt_of(question, "plain")
    options = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=True)]
    return "\n".join([question.question.strip(), *options, _STANDARD[question.language][1]])
