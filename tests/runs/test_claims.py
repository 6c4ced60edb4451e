"""What a certificate states beside epsilon, and what lies beside it: an edit is found though every hash was mended."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load, save

from conftest import tiny_overrides
from drencoder.recipe.recipe import load_recipe
from drencoder.runs import run as experiment
from drencoder.runs.model_card import write_model_card
from tampering import Forgery, reaccount, verdict

Edit = Callable[[Forgery], object]


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "notes.jsonl"
    row = {"instruction": "Say it.", "response": "It is said."}
    text.write_text("".join(json.dumps({**row, "context": f"Note {n}.", "who": f"p{n % 6}"}) + "\n" for n in range(24)))
    own = [f"data.source={text}", "data.client_field=who", "data.held_out_share=0.4", "federation.population=0"]
    overrides = [*tiny_overrides(tiny_folder), "evaluation.examples=64", "privacy.trust=central", *own]
    experiment.run(load_recipe("quickstart", overrides), folder / "run", samples=True)
    return folder / "run"


def certificate(*path: str, to: Any) -> Edit:
    def edit(run: Forgery) -> None:
        place = run.certificate
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to(place[path[-1]]) if callable(to) else to

    return edit


def text(name: str, old: str, new: str) -> Edit:
    def edit(run: Forgery) -> None:
        page = (run.path / name).read_text()
        assert old in page
        (run.path / name).write_text(page.replace(old, new))

    return edit


def adapter(change: Callable[[str, Any], tuple[str, Any]]) -> Edit:
    def edit(run: Forgery) -> None:
        path = run.folder.adapter / "adapter_model.safetensors"
        path.write_bytes(save(dict(change(name, values) for name, values in load(path.read_bytes()).items())))

    return edit


def adapter_config(key: str, value: Any) -> Edit:
    """An edit of what PEFT reads, in the checkpoint's digests, too."""

    def edit(run: Forgery) -> None:
        path = run.folder.adapter / "adapter_config.json"
        run.folder.write_json(path, json.loads(path.read_text()) | {key: value})

    return edit


def metrics(change: Callable[[list[dict[str, Any]]], object]) -> Edit:
    def edit(run: Forgery) -> None:
        rows = run.folder.read_metrics()
        change(rows)
        run.folder.keep_metrics(rows)

    return edit


EDITS: dict[str, Edit] = {
    "other data": certificate("data", to="public text of Wikipedia"),
    "other base": certificate("base", "hub_id", to="ORG/Larger"),
    "other revision": certificate("base", "revision", to="a" * 40),
    "other licence": certificate("base", "licence", to="mit"),
    "other dtype": certificate("base", "dtype", to="bfloat16"),
    "other kind of clip": certificate("clip", "kind", to="adaptive"),
    "other clip": certificate("clip", "clip_l2", to=0.01),
    "clip from elsewhere": certificate("clip", "start", to="named by the clients"),
    "more bytes to compare with": certificate("bytes", "plain_lora", to=10**12),
    "fewer bits": certificate("bytes", "bits_per_value", to=1),
    "other ratio": certificate("encoder", "ratio", to=0.001),
    "other text for the encoder": certificate("encoder", "public", to=lambda public: not public),
    "other start": certificate("adapter_start", to="public"),
    "larger vocabulary": certificate("uniform_loss", to=lambda loss: math.log(round(math.exp(loss)) + 1)),
    "other version": certificate("drencoder", to="9.9"),
    "other day": certificate("finished", to="2001-01-01T00:00:00+00:00"),
    "claim of its own": lambda run: run.certificate.update(audited_by="somebody"),
    "hidden twin": lambda run: (run.path / "twin").mkdir(),
    "adapter in float16": adapter(lambda name, values: (name, (0 * values).astype("float16"))),
    "adapter in whole numbers": adapter(lambda name, values: (name, (0 * values).astype("int32"))),
    "layers of other names": adapter(lambda name, values: (name.replace("q_proj", "q_prok"), values)),
    "transposed matrices": adapter(lambda name, values: (name, values.reshape(values.shape[::-1]))),
    "larger alpha": adapter_config("lora_alpha", 1600.0),
    "another scale": adapter_config("use_rslora", True),
    "adapter of another model": adapter_config("base_model_name_or_path", "ORG/Larger"),
    "alpha by layer": adapter_config("alpha_pattern", {"q_proj": 99}),
    "no tokenizer": lambda run: (run.folder.adapter / "tokenizer.json").unlink(),
    "other template": text("adapter/chat_template.jinja", "Answer:", "Reply:"),
    "file beside the adapter": lambda run: (run.folder.adapter / "GUARANTEE.md").write_text("epsilon 0"),
    "smaller epsilon in the report": text("report.html", "<td class=n>8.", "<td class=n>0."),
    "statement of the report": text("report.html", "differential privacy", "perfect privacy"),
    "no report": lambda run: run.folder.report.unlink(),
    "other samples": text("samples.json", "sky", "sea"),
    "no samples": lambda run: run.folder.samples.unlink(),
    "smaller epsilon in the metrics": metrics(lambda rows: rows[-1]["epsilon"].update(public=1e-3)),
    "smaller loss in the metrics": metrics(lambda rows: rows[-1].update(loss=0.1)),
    "claim in the metrics": metrics(lambda rows: rows[1].update(note="x")),
    "claim in the recipe": lambda run: run.folder.recipe.write_text(f"# epsilon 0\n{run.folder.recipe.read_text()}"),
    "epsilon twice": lambda run: None,  # below
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_whose_hashes_were_all_mended_is_found(run: Path, tmp_path: Path, name: str) -> None:
    forged = Forgery(run, tmp_path / "run")
    EDITS[name](forged)
    forged.folder.model_card.write_text(write_model_card(forged.certificate))
    forged.mend()
    if name == "epsilon twice":  # of which readers take one or the other
        page = forged.folder.certificate.read_text()
        forged.folder.certificate.write_text(page.replace("{", '{\n  "delta": 0.0,', 1))
        forged.mend_digests()
    assert verdict(forged.path) != ""
    assert reaccount(forged.path) == 1


@pytest.mark.parametrize("key", ["r", "lora_alpha", "lora_dropout", "use_dora", "rank_pattern", "modules_to_save"])
def test_how_an_adapter_is_used_follows_from_the_recipe(run: Path, tmp_path: Path, key: str) -> None:
    """Also where the checkpoint's digest of adapter_config.json was mended."""
    forged = Forgery(run, tmp_path / "run")
    adapter_config(key, {"q_proj": 5})(forged)
    tensors, facts = forged.checkpoint()
    digest = forged.digest_of(forged.folder.adapter / "adapter_config.json")
    stated = facts["stated"] | {"adapter": facts["stated"]["adapter"] | {"adapter_config.json": digest}}
    forged.write_checkpoint(tensors, facts | {"stated": stated})
    forged.mend()
    assert verdict(forged.path) == f"adapter_config.json has another {key} than the run."
    assert reaccount(forged.path) == 1


def test_the_run_itself_holds(run: Path, tmp_path: Path) -> None:
    assert verdict(run) == ""
    assert reaccount(run) == 0
    forged = Forgery(run, tmp_path / "run")
    forged.recertify()
    assert verdict(forged.mend()) == ""
    assert reaccount(forged.path) == 0
