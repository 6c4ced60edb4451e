"""The model card of a finished run's adapter: what the certificate says, for whoever is handed the adapter. No torch.

It says nothing that the certificate does not, so that `verify` can write it again and compare.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from drencoder.privacy.site_epsilons import UNITS

_BITS = {
    "int8": "load_in_8bit=True",
    "nf4": 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16"',
}
_TAGS = ("lora", "differential-privacy", "federated-learning", "drencoder")


def write_model_card(certificate: Mapping[str, Any]) -> str:
    """The text of `adapter/README.md`, from what `certificate.json` holds.

    Raises:
      LookupError, TypeError, ValueError: it is no certificate of a finished run.
    """
    base, data = certificate["base"], certificate["data"]
    name = base["hub_id"] or certificate["model"]
    lines = [
        *_front_matter(base),
        f"# {_one_line(certificate['name'])}",
        "",
        f"A LoRA adapter for the model {_code(name)}, made with drencoder {_one_line(certificate['drencoder'])} in "
        f"{certificate['rounds']} rounds.",
        "",
        "## Privacy",
        "",
        _one_line(certificate["statement"]),
        "",
        *_observers(certificate),
        "",
        f"Unit of privacy: {UNITS.get(certificate['unit'], _one_line(certificate['unit']))}. Delta: {certificate['delta']:g}. "
        "Epsilon is that of the whole run.",
        *_sites(certificate.get("unit_terms")),
        "",
        "## Data",
        "",
        _one_line(data) if isinstance(data, str) else _code(json.dumps(data, ensure_ascii=False)),
        "",
        "## Results",
        "",
        *_results(certificate),
        "## How to load it",
        "",
        *_loading(certificate["model"], base),
        "",
        f"Licence of the base model, as its own files state it: {_one_line(base['licence'])}.",
    ]
    return "\n".join(lines) + "\n"


def _front_matter(base: Mapping[str, Any]) -> Iterator[str]:
    """What the hub reads; JSON texts are YAML texts."""
    yield "---"
    yield "library_name: peft"
    yield "pipeline_tag: text-generation"
    yield f"license: {json.dumps(base['licence'])}"
    if base["hub_id"]:
        yield f"base_model: {json.dumps(base['hub_id'])}"
    yield "tags:"
    yield from (f"- {tag}" for tag in _TAGS)
    yield "---"


def _observers(certificate: Mapping[str, Any]) -> Iterator[str]:
    yield "| observer | epsilon, add/remove | epsilon, replace-one | assumes |"
    yield "|---|---|---|---|"
    for name, guarantee in certificate["observers"].items():
        numbers = (guarantee["by_relation"][relation]["epsilon_pld"] for relation in ("add_remove", "replace_one"))
        shown = " | ".join(f"{float(number):.3f}" for number in numbers)
        yield f"| {_one_line(name)} | {shown} | {_one_line(guarantee['assumption'])} |"


def _sites(terms: Mapping[str, Any] | None) -> Iterator[str]:
    """What is taken to be public of the sites, where the unit is inside one."""
    if terms:
        public = terms["assumed_public"]
        yield ""
        yield (
            f"Taken to be public: {terms['sites']} sites, {public['units_per_site']} units a site, each of which takes part with "
            f"probability {public['sampling_rate']:g}. {_one_line(terms['private'])} {_one_line(terms['amplification'])} "
            f"Not protected: {_one_line(terms['not_protected'])}"
        )


def _results(certificate: Mapping[str, Any]) -> Iterator[str]:
    """The table of what was measured, if anything was, and what the certificate says of it in words."""
    results = certificate["results"]
    names = ["loss", *dict.fromkeys(name for row in results.values() for name in row["accuracy"])]
    measured: dict[str, dict[str, Any]] = {
        name: {model: _values(row).get(name) for model, row in results.items()} for name in names
    }
    names = [name for name in names if all(measured[name].values())]
    if results and names:
        headings = ("held-out loss" if name == "loss" else _one_line(name) for name in names)
        yield "| model | " + " | ".join(headings) + " |"
        yield "|---|" + "---|" * len(names)
        for model in results:
            yield f"| {_one_line(model)} | " + " | ".join(f"{measured[n][model]['value']:.4f}" for n in names) + " |"
        yield ""
    for key in ("verdict", "evaluation_rests_on"):
        if certificate.get(key):
            yield from (_one_line(certificate[key]), "")


def _values(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"loss": row.get("loss"), **row["accuracy"]}


def _loading(source: str, base: Mapping[str, Any]) -> Iterator[str]:
    arguments, first = json.dumps(base["hub_id"] or source, ensure_ascii=False), ""
    if source == "embedded":
        arguments, first = "embedded_folder()", "from drencoder.models.place import embedded_folder"
    elif not base["hub_id"] and source.lower().endswith(".gguf"):
        path = PurePath(source)
        arguments = (
            f"{json.dumps(str(path.parent), ensure_ascii=False)}, gguf_file={json.dumps(path.name, ensure_ascii=False)}"
        )
    elif base["hub_id"] and base["revision"]:
        arguments += f", revision={json.dumps(base['revision'])}"
    bits = _BITS.get(base["dtype"])
    arguments += f', dtype="{"bfloat16" if bits else base["dtype"]}"'  # that of the checkpoint gives other losses
    arguments += f", quantization_config=BitsAndBytesConfig({bits})" if bits else ""
    yield "```python"
    yield from filter(None, (first,))
    yield "from peft import PeftModel"
    yield f"from transformers import AutoModelForCausalLM, AutoTokenizer{', BitsAndBytesConfig' if bits else ''}"
    yield ""
    yield 'folder = "adapter"  # the folder of this file'
    yield "tokenizer = AutoTokenizer.from_pretrained(folder)"
    yield f"base = AutoModelForCausalLM.from_pretrained({arguments})"
    yield "model = PeftModel.from_pretrained(base, folder)"
    yield "```"


def _one_line(text: Any) -> str:
    """A text that cannot leave its line or its cell."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def _code(text: str) -> str:
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"
