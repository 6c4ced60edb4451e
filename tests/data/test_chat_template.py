"""Chat templates of the kinds that real models have: where the replies stand, and what a template can refuse."""

from pathlib import Path

import pytest

from drencoder.data.chat_template import ChatTemplate, open_template
from drencoder.data.prompts_template import PlainTemplate, pack_history
from drencoder.data.tokenization import RecordTokenizer
from drencoder.errors import DataError
from text_models import CHAT, make_tokenizer

TEMPLATES = {
    "turns": CHAT,
    # As Gemma: no system message, roles alternate, the assistant is called model.
    "alternating": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}<|turn|>{{ 'model' if message['role'] == 'assistant' else 'user' }}\n"
    "{{ message['content'] | trim }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|turn|>model\n{% endif %}",
    # As LLaMA-2 and Mistral: no opening of a reply, a space before it, the end token after it.
    "instructions": "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' "
    "+ eos_token }}{% else %}{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}",
    # As Qwen3: an empty thought before the last reply, which the prompt does not have; thoughts in a reply are taken out.
    "thoughts": "{% for message in messages %}<|turn|>{{ message['role'] }}\n{% if message['role'] == 'assistant' and loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ message['content'].split('</think>')[-1] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}",
    # No control token ends a turn: the tokenizer's end token has to.
    "headings": "{% for message in messages %}### {{ message['role'] }}:\n{{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}",
}
LEARNED = {
    "turns": "A stone<|end|>",
    "alternating": "A stone<|end|>",
    "instructions": " A stone </s>",
    "thoughts": "<think>\n\n</think>\n\nA stone<|end|>",
    "headings": "A stone</s>",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_reply_and_the_end_of_its_turn_are_learned(name: str) -> None:
    tokenizer = make_tokenizer("bytes", template=TEMPLATES[name])
    records = RecordTokenizer.open(tokenizer, template="auto", max_tokens=200, end_id=2, start=(1,))
    record = {"instruction": "What is A?", "response": "A stone"}
    example = records.tokenise(record).example
    assert example is not None
    assert tokenizer.decode(example.tokens[example.prompt_length :]) == LEARNED[name]
    assert records.prompt(record) == list(example.tokens[: example.prompt_length])
    conversation = {**record, "history": pack_history([("A?", "A"), ("What?", "is A?")])}
    example = records.tokenise(conversation).example
    assert example is not None
    learned = [t for i, t in enumerate(example.tokens) if i >= example.prompt_length and i not in example.given]
    words = tokenizer.decode(learned)
    assert words.endswith(LEARNED[name])
    for control in ("<|end|>", "</s>"):
        words = words.replace(control, "")
    assert words.replace(" ", "").replace("<think>\n\n</think>\n\n", "") == "AisA?Astone"
    some = records.tokenise({**conversation, "unlearned": "[-2]"}).example
    assert some is not None
    assert some.tokens == example.tokens
    assert "is A?" in tokenizer.decode(some.tokens[some.prompt_length :])
    assert some.prompt_length > example.prompt_length


def test_what_a_template_refuses_is_one_sentence_without_the_records_words() -> None:
    tokenizer = make_tokenizer("bytes", template=TEMPLATES["alternating"])
    template = open_template("chat", tokenizer)
    record = {"instruction": "secret question", "response": "secret reply", "system": "secret system"}
    with pytest.raises(DataError, match=r"System role not supported") as caught:
        template.render(record)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    telling = "{% for message in messages %}{{ message['content'] }}{% if loop.length > 2 %}{{ raise_exception(message['content']) }}"
    tokenizer.chat_template = telling + "{% endif %}{% endfor %}"
    with pytest.raises(DataError, match=r"refuses a record's messages \(TemplateError\)") as caught:
        open_template("chat", tokenizer).render(record)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% for message in messages %}", "Unexpected end of template"),
        ("{{ ().__class__.__bases__[0].__subclasses__() }}", "SecurityError"),
        ("{{ messages[0]['content'] }}", "does not show a reply"),
        ("{{ nothing.at.all }}", "UndefinedError"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_when_it_is_opened(source: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(source)
    with pytest.raises(DataError, match=words) as caught:
        open_template(str(path), make_tokenizer("bytes"))
    assert "\n" not in str(caught.value)
    assert "own.jinja" in str(caught.value)


def test_which_template_is_meant(tmp_path: Path) -> None:
    plain, chat = make_tokenizer("bytes"), make_tokenizer("bytes", template=CHAT)
    assert isinstance(open_template("auto", plain), PlainTemplate)
    assert isinstance(open_template("plain", chat), PlainTemplate)
    assert isinstance(open_template("auto", chat), ChatTemplate)
    with pytest.raises(DataError, match=r"no chat template: set data\.template = 'plain'"):
        open_template("chat", plain)
    with pytest.raises(DataError, match=r"cannot be read \(No such file"):
        open_template(str(tmp_path / "absent.jinja"), plain)
    (tmp_path / "latin.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        open_template(str(tmp_path / "latin.jinja"), plain)
    with pytest.raises(DataError, match=r"leaves no room .* set data\.max_tokens to \d+"):
        RecordTokenizer.open(chat, template="auto", max_tokens=8, end_id=2, start=(1,))
