"""The losses that a run reports are those of its adapter in plain peft and transformers, on the rendered text."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import tiny_overrides
from drencoder.recipe.recipe import load_recipe
from drencoder.runs import run as experiment
from drencoder.runs.generate import generate
from drencoder.runs.verify import verify_run
from text_models import CHAT, make_tokenizer, save_model

QUESTION, ANSWER = "Say the word\nabout it", "red river stone"


@pytest.mark.parametrize("template", ["plain", "chat", "file"])
@pytest.mark.parametrize("kind", ["llama2", "bytes"])
def test_losses_are_those_of_the_saved_adapter_in_plain_peft(kind: str, template: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", make_tokenizer(kind, template=CHAT if template == "chat" else None))
    if template == "file":
        (tmp_path / "file.jinja").write_text(CHAT.replace("<|turn|>", "<|turn|> "))
    records = [
        {"instruction": "Say the word", "context": "about it", "response": ANSWER, "who": f"p{i % 6}"}
        for i in range(60)
    ]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, records)))
    name = {"plain": "plain", "chat": "auto", "file": tmp_path / "file.jinja"}[template]
    changes = {
        "data.source": tmp_path / "text.jsonl", "data.client_field": "who", "data.template": name, "data.max_tokens": 200,
        "data.held_out_share": 0.34, "federation.population": 0, "federation.sampling_rate": 1.0,
        "federation.rounds": 2, "privacy.trust": "central", "evaluation.benchmarks": [], "encoder.name": "identity",
        "encoder.ratio": 0.0, "prior.source": "none", "server.learning_rate": 0.1,
    }  # fmt: skip
    recipe = load_recipe("quickstart", tiny_overrides(model)).changed(
        {key: str(value) if isinstance(value, Path) else value for key, value in changes.items()}
    )
    result = experiment.run(recipe, tmp_path / "run")
    assert not verify_run(result.folder).trouble
    outcomes = json.loads((result.folder / "outcomes.json").read_text())

    tokenizer = AutoTokenizer.from_pretrained(result.adapter)  # the template that was trained with is its own
    user, reply = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
    prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([user, reply], tokenize=False)
    asked, ids = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, whole))
    assert ids[: len(asked)] == asked
    if template == "plain":
        assert asked == tokenizer(QUESTION + "\nAnswer:").input_ids
        assert ids == [*tokenizer(f"{QUESTION}\nAnswer: {ANSWER}").input_ids, tokenizer.eos_token_id]
    else:
        ids = ids[
            : ids.index(tokenizer.convert_tokens_to_ids("<|end|>"), len(asked)) + 1
        ]  # but not the line break behind
    (tmp_path / "file.jinja").unlink(missing_ok=True)  # the run has its own copy
    assert generate(result.folder, QUESTION, max_tokens=1).prompt_tokens == len(asked)
    for name, values in outcomes.items():
        plain = AutoModelForCausalLM.from_pretrained(model)
        if name == "this run":
            plain = PeftModel.from_pretrained(plain, result.adapter)
        if name == "zero update":
            continue
        with torch.no_grad():
            log_p = plain.eval()(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        expected = -sum(log_p[i - 1, ids[i]].item() for i in range(len(asked), len(ids)))
        assert values["targets"][0] == len(ids) - len(asked)
        assert values["losses"][0] == pytest.approx(expected, abs=1e-4 * len(ids)), name
    base, run = (sum(outcomes[name]["losses"]) for name in ("base model", "this run"))
    assert abs(base - run) > 0.01 * base
