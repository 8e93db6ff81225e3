"""What callers get wrong: an exception that says what was expected, and a model that goes on."""

from __future__ import annotations

import numpy as np
import pytest

import qdelta
from golden_data import TEXT

ASK = [{"role": "user", "content": "Hello!"}]


@pytest.fixture(scope="module")
def model():
    model = qdelta.load("demo", quant="none", threads=2, progress=False)
    before = model.generate("Once upon a time", max_tokens=3, temperature=0).tokens
    yield model
    assert model.generate("Once upon a time", max_tokens=3, temperature=0).tokens == before


@pytest.mark.parametrize("prompt", ["", [], (), np.array([], np.int32)], ids=str)
def test_empty_prompt(model, prompt):
    for call in (model.generate, model.stream, model.astream, model.logits, model.perplexity):
        with pytest.raises(qdelta.ArgumentError, match="empty"):
            call(prompt)
    for parts in ((prompt, "a"), ("a", prompt)):
        with pytest.raises(qdelta.ArgumentError, match="empty"):
            model.score(*parts)
    with pytest.raises(qdelta.ArgumentError, match="empty"):
        model.session().feed(prompt if not isinstance(prompt, str) else [])


@pytest.mark.parametrize(
    "prompt",
    [5, None, 1.5, [1.5], [[1, 2]], ["a", "b"], [None], {"role": "user"}, b"abc", [-1], [2**40]],
    ids=str,
)
def test_prompts_of_other_kinds(model, prompt):
    for call in (model.generate, model.stream):
        with pytest.raises(qdelta.ArgumentError, match=r"^ids: "):
            call(prompt)


@pytest.mark.parametrize("name", ["ctx", "threads"])
@pytest.mark.parametrize("value", [0, -1, 10**30, 1.5, True, "2"], ids=str)
def test_numbers_of_a_load(name, value):
    with pytest.raises(qdelta.ArgumentError, match=f"^{name} is .*, expected 1"):
        qdelta.load("demo", quant="none", progress=False, **{name: value})


@pytest.mark.parametrize("id", [4096, 100_000, 2**31 - 1])
def test_ids_beyond_the_vocabulary(model, id):
    for call in (model.generate, model.logits):
        with pytest.raises(qdelta.ArgumentError, match=f"token {id}, the vocabulary has 4096"):
            call([1, id])
    session = model.session()
    with pytest.raises(qdelta.ArgumentError):
        session.feed([1, id])
    assert session.n_tokens == 0


def test_prompt_beyond_the_context(model):
    for call in (model.generate, model.stream, model.logits):
        with pytest.raises(qdelta.ContextError, match="2049 tokens needed, the context holds 2048"):
            call([5] * 2049)
    with pytest.raises(qdelta.ContextError):
        model.chat("word " * 3000)
    with pytest.raises(qdelta.ContextError) as caught:
        model.score([5] * 2000, [5] * 50)
    assert (caught.value.needed, caught.value.available) == (2049, 2048)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("character", ["a", " ", "\n", "1", "世", "\u0301"])
def test_a_megabyte_of_one_character(model, character):
    with pytest.raises(qdelta.ContextError) as caught:
        model.generate(character * 1_000_000)
    assert caught.value.needed > 2048 == caught.value.available


@pytest.mark.parametrize("call", ["generate", "stream", "chat"])
def test_lone_surrogates(model, call):
    for text in ("\ud83d", "a\udc00b", "x" * 5000 + "\ud800"):
        with pytest.raises(qdelta.ArgumentError, match=r"lone surrogate U\+D"):
            getattr(model, call)(text)
    with pytest.raises(qdelta.ArgumentError, match="surrogate"):
        model.chat("Hi", tools=[{"name": "\ud800"}])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": -1}, "max_tokens: an integer of 0 or more expected, got -1"),
        ({"max_tokens": 1.5}, "max_tokens: an integer"),
        ({"max_tokens": "5"}, "max_tokens: an integer"),
        ({"max_tokens": True}, "max_tokens: an integer"),
        ({"timeout": -1}, "timeout: seconds"),
        ({"timeout": float("nan")}, "timeout: seconds"),
        ({"timeout": "1"}, "timeout: seconds"),
        ({"stop": ""}, "stop: texts of at least one character"),
        ({"stop": ["a", ""]}, "stop: texts"),
        ({"stop": [5]}, "stop: texts"),
        ({"stop": 5}, "stop: a text or a list of texts"),
        ({"temperature": -1}, "temperature: 0 or more expected"),
        ({"top_p": 0}, "top_p: above 0"),
        ({"top_k": 1.5}, "top_k: an integer"),
        ({"seed": -5}, "seed: an integer"),
        ({"logit_bias": {99999: 1.0}}, "logit_bias: token 99999"),
        ({"preset": "nice"}, "preset: this model has no profile 'nice'"),
        ({"preset": 5}, "preset: this model has no profile 5"),
        ({"preset": "chat", "sampling": qdelta.Sampling()}, "preset, sampling"),
        ({"sampling": {"top_k": 5}}, "sampling: a Sampling expected, got dict"),
        ({"processors": [5]}, "processors: callables"),
        ({"processors": 5}, "processors: callables"),
    ],
    ids=str,
)
def test_bad_settings(model, settings, message):
    for call in (model.generate, model.chat, model.stream):
        with pytest.raises(qdelta.ArgumentError, match=message):
            call("Once", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"think": 5}, "think: True, False or None expected, got 5"),
        ({"think": "yes"}, "think: True"),
        ({"think": True, "reasoning_effort": "none"}, "contradict"),
        ({"template_options": {"enable_thinking": 1}}, "enable_thinking: True"),
        ({"template_options": 5}, "template_options: a mapping"),
        ({"system": "drop"}, 'system: "merge" or "strict"'),
        ({"tools": "x"}, "tools: a list"),
    ],
    ids=str,
)
def test_bad_chat_settings(model, settings, message):
    with pytest.raises(qdelta.ArgumentError, match=message):
        model.chat(ASK, **settings)


def test_messages_where_a_text_belongs(model):
    with pytest.raises(qdelta.ArgumentError, match=r"use chat\(\) for messages"):
        model.generate(ASK)


@pytest.mark.parametrize("messages", [[], None, 5, {"role": "user"}, [1, 2], ["x"]], ids=str)
def test_bad_messages(model, messages):
    with pytest.raises(qdelta.ArgumentError, match="messages"):
        model.chat(messages)


def test_pictures_are_refused(model):
    parts = [{"type": "image_url", "image_url": {"url": "data:"}}, {"type": "text", "text": "?"}]
    for call in (model.chat, model.stream):
        with pytest.raises(qdelta.UnsupportedError, match="images and video"):
            call([{"role": "user", "content": parts}])


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("no/such/folder/at all", qdelta.ArgumentError, "no such file or folder"),
        ("model.gguf", qdelta.Error, "gguf"),
        ("missing.safetensors", qdelta.Error, "missing"),
    ],
)
def test_models_that_are_not_there(name, error, message):
    for open_it in (qdelta.load, qdelta.Tokenizer):
        with pytest.raises(error, match=message):
            open_it(name)


def test_folder_without_a_tokenizer(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((TEXT / "tiny-f32" / name).read_bytes())
    with pytest.raises(qdelta.FileError, match=r"tokenizer\.json: missing"):
        qdelta.load(tmp_path, quant="none")


def test_tokenizer_larger_than_the_model(tmp_path):
    for file in (TEXT / "tiny-f32").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"480"', '"600"'))
    with pytest.raises(qdelta.FileError, match="ids up to 600, the model has 512 rows"):
        qdelta.load(tmp_path, quant="none")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "an object expected"),
        ('{"eos_token_id": "x"}', "eos_token_id 'x'"),
        ('{"temperature": -1}', "temperature: 0 or more"),
    ],
)
def test_damaged_generation_config(tmp_path, content, message):
    for file in (TEXT / "tiny-f32").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(qdelta.FileError, match=rf"generation_config\.json.*{message}"):
        qdelta.load(tmp_path, quant="none")


@pytest.mark.parametrize("settings", [{"window": 1}, {"window": 2.5}, {"window": 200}])
def test_bad_windows(model, settings):
    with pytest.raises(qdelta.ArgumentError, match="window"):
        model.perplexity([5] * 100, **settings)
    with pytest.raises(qdelta.ContextError):
        model.perplexity([5] * 5000, window=4000)


def test_bad_ids_to_decode(model):
    for ids in ([-1], ["a"], [1.5], [None]):
        with pytest.raises(qdelta.ArgumentError, match="token ids"):
            model.decode(ids)
    for text in (5, None, b"abc"):
        with pytest.raises(qdelta.ArgumentError, match="str expected"):
            model.encode(text)


def test_empty_model_name():
    with pytest.raises(qdelta.ArgumentError, match="model: empty"):
        qdelta.load("")
