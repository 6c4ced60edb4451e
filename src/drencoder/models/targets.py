"""Which linear layers of a model get a LoRA pair, decided by their names. No torch: the plan asks, too.

A target is the whole name of a layer or its last parts, as in PEFT: `c_proj` names `attn.c_proj` and `mlp.c_proj` alike.
"""

import difflib
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from drencoder.errors import ModelError
from drencoder.reading import shown

AUTO, ALL_LINEAR = "auto", "all-linear"

FAMILY_TARGETS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "bloom": ("query_key_value",),
        "codegen": ("qkv_proj",),
        "falcon": ("query_key_value",),
        "gpt2": ("c_attn",),
        "gpt_bigcode": ("c_attn",),
        "gpt_neox": ("query_key_value",),
        "mpt": ("Wqkv",),
        "phi": ("q_proj", "v_proj", "fc1", "fc2"),
        "rwkv": ("key", "value", "receptance", "output"),
    }
)
"""PEFT's own table (TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING) for the causal families in which it names anything but
the query and value projections; a test compares the two. PEFT's table cannot be imported without torch."""

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj")


def is_automatic(targets: Sequence[str]) -> bool:
    """Whether the layers are chosen by rule, and not named one by one."""
    return tuple(targets) in ((AUTO,), (ALL_LINEAR,))


def last_part(name: str) -> str:
    """`model.layers.0.self_attn.q_proj` -> `q_proj`."""
    return name.rpartition(".")[2]


def choose_targets(targets: Sequence[str], names: Sequence[str], family: str, model: str) -> list[str]:
    """Returns the names of the layers that `targets` chooses, in the order of `names`.

    `auto` takes what PEFT's table has for the family. Where that is the query and value projections, the key and output
    projections of attention come with them: the published experiments of this method (arXiv 2405.13746) adapt all four. A
    family that the table lacks is treated alike if it has these projections; of any other family all linear layers are taken.

    Args:
      targets: `("auto",)`, `("all-linear",)`, or names.
      names: the model's linear layers, without its output head if `targets` is automatic.
      family: `model_type` of the model's config.json.
      model: how the model is called in an error.

    Raises:
      ModelError: a target names no linear layer. The sentence has the nearest name and all others.
    """
    if is_automatic(targets):
        wanted = _automatic(targets[0], {last_part(name) for name in names}, family)
    else:
        for target in targets:
            if not any(_matches(name, target) for name in names):
                raise ModelError(_unmatched(target, names, model))
        wanted = set(targets)
    return [name for name in names if any(_matches(name, target) for target in wanted)]


def _automatic(rule: str, present: set[str], family: str) -> set[str]:
    if rule == ALL_LINEAR:
        return present
    chosen = set(FAMILY_TARGETS.get(family, ())) & present
    if {"q_proj", "v_proj"} <= present:
        chosen |= set(_ATTENTION) & present
    return chosen or present


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _unmatched(target: str, names: Sequence[str], model: str) -> str:
    """One sentence: the name that is wrong, the nearest one, and all that can be named."""
    short = list(dict.fromkeys(map(last_part, names)))
    known = short if "." not in target else list(names)
    near = difflib.get_close_matches(target, known, n=1, cutoff=0.0)
    hint = f"the nearest name is {near[0]!r}, and " if near else ""
    listed = ", ".join(short[:24]) + (f" and {len(short) - 24} more" if len(short) > 24 else "") if short else "none"
    return (
        f"adapter.targets: {shown(target)} names no linear layer of {shown(model)}: {hint}its linear layers are {listed}; or set "
        "adapter.targets = 'auto'."
    )
