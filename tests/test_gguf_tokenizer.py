"""The tokenizer and the template inside a GGUF file, read and written."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qdelta
import real_tokenizer
from golden_data import GOLDEN, TEXT
from qdelta import _native, gguf, weights
from qdelta.source import tokenizer_files
from tiny import make_checkpoint

CASES = real_tokenizer.CASES
VOCAB_SIZE = 248320
TOKENS, TYPES, MERGES = (f"tokenizer.ggml.{key}" for key in ("tokens", "token_type", "merges"))
END, END_OF_TEXT, PAD = 248046, 248044, 248044

Entries = dict[str, Any]


@functools.cache
def real_metadata() -> Entries:
    """Metadata of the released tokenizer."""
    files = real_tokenizer.files()
    return dict(gguf.metadata(files, name="real", licence=None, vocab_size=VOCAB_SIZE))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with the released tokenizer, written by the program."""
    folder = tmp_path_factory.mktemp("real")
    checkpoint = make_checkpoint(
        folder / "model", {"vocab_size": VOCAB_SIZE, "num_hidden_layers": 1}, tokenizer=False
    )
    for name, content in real_tokenizer.files().items():
        (checkpoint / name).write_bytes(content)
    out = folder / "real.gguf"
    source = _native.Checkpoint(str(checkpoint))
    weights.convert_to_gguf(source, checkpoint, out, dtype="Q8_0")
    return out


@pytest.fixture(scope="module")
def tokenizer(written: Path) -> qdelta.Tokenizer:
    return qdelta.Tokenizer(written)


def small(**changes: object) -> Entries:
    """Metadata of a tokenizer of nine tokens; a change to None removes a key."""
    entries: Entries = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen35",
        TOKENS: ["a", "b", "c", "ab", "\u0120", "<|endoftext|>", "<|im_end|>", "<think>", "[PAD8]"],
        TYPES: [1, 1, 1, 1, 1, 3, 3, 4, 5],
        MERGES: ["a b"],
        "tokenizer.ggml.eos_token_id": 6,
        "tokenizer.ggml.padding_token_id": 5,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }
    for key, value in changes.items():
        key = key if "." in key else f"tokenizer.ggml.{key}"
        if value is None:
            del entries[key]
        else:
            entries[key] = value
    return entries


def read(entries: Entries) -> qdelta.Tokenizer:
    return qdelta.Tokenizer.from_files(gguf.tokenizer_files(entries.get, "x.gguf"))


def parsed(entries: Entries, name: str) -> dict[str, Any]:
    return json.loads(gguf.tokenizer_files(entries.get, "x.gguf")[name])


# ----------------------------------------------------------------------- the released tokenizer


def test_text_cases(tokenizer):
    assert len(CASES["text_cases"]) > 300
    for case in CASES["text_cases"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case
        assert tokenizer.decode(case["ids"], skip_special=False) == case["decoded"], case


def test_decode_cases(tokenizer):
    for case in CASES["decode_cases"]:
        assert tokenizer.decode(case["ids"], skip_special=False) == case["text"], case
        assert tokenizer.decode(case["ids"]) == case["text_skip_special"], case


def test_every_id(tokenizer):
    """Bytes, length of the vocabulary, and that ids of padding stand for nothing."""
    want = real_tokenizer.tokenizer()
    assert tokenizer.vocab_size == want.vocab_size
    for id in range(VOCAB_SIZE):
        assert tokenizer.token_bytes(id) == want.token_bytes(id), id


def test_chat_and_stops(written):
    model = qdelta.load(written)
    cases = json.loads((GOLDEN / "chat" / "cases.json").read_text(encoding="utf-8"))
    plain = [case for case in cases if not case.get("tools") and "error" not in case]
    assert len(plain) > 10
    for case in plain[:10]:
        text = model.render(case["messages"], **case["options"])
        assert text == case["text"], case["name"]
        assert model.encode(text) == case["ids"], case["name"]
    assert model.stop_ids == {END, END_OF_TEXT}
    assert model.generation_config["eos_token_id"] == [END_OF_TEXT, END]


def test_random_texts(tokenizer):
    rng, want = random.Random(3), real_tokenizer.tokenizer()
    words = [case["text"] for case in CASES["text_cases"] if case["text"]]
    for _ in range(300):
        text = "".join(rng.choice(words)[: rng.randrange(20)] for _ in range(6))
        assert tokenizer.encode(text) == want.encode(text)
        assert tokenizer.encode(text, special=False) == want.encode(text, special=False)


def test_what_is_written():
    """As gguf files of the family have it."""
    entries = real_metadata()
    tokens, types, merges = entries[TOKENS], entries[TYPES], entries[MERGES]
    assert len(tokens) == len(types) == VOCAB_SIZE and len(merges) == 247587
    assert tokens[220] == "\u0120" and tokens[END] == "<|im_end|>"
    assert tokens[248319] == "[PAD248319]"
    assert merges[:3] == ["\u0120 \u0120", "\u0120\u0120 \u0120\u0120", "i n"]
    assert {type: types.count(type) for type in set(types)} == {1: 248044, 3: 21, 4: 12, 5: 243}
    assert entries["tokenizer.ggml.eos_token_id"] == END
    assert entries["tokenizer.ggml.padding_token_id"] == PAD
    assert entries["tokenizer.ggml.add_bos_token"] is False
    assert entries["tokenizer.ggml.model"] == "gpt2" and entries["tokenizer.ggml.pre"] == "qwen35"
    assert entries["general.sampling.top_k"] == 20
    template = real_tokenizer.files()["chat_template.jinja"].decode()
    assert entries["tokenizer.chat_template"] == template


def test_a_file_from_a_file(written, tmp_path):
    """What is read from a written file and written again is the same."""
    source = _native.Checkpoint(str(written))
    for key, value in real_metadata().items():
        if isinstance(value, float):
            value = pytest.approx(value, rel=1e-7)
        assert key == "general.name" or source.gguf_value(key) == value, key
    again = gguf.metadata(
        tokenizer_files(written), name="real", licence=None, vocab_size=VOCAB_SIZE
    )
    # One of the two end tokens that the files' own settings state is found by its text.
    assert dict(again) == real_metadata()


# ------------------------------------------------------------------------- the reference's files


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("tiny-f32-F32", "tiny-f32"),
        ("tiny-k256-bf16-Q8_0", "tiny-k256-bf16"),
        ("tiny-k256-bf16-Q4_K_M", "tiny-k256-bf16"),
    ],
)
def test_files_of_the_converter(name, folder):
    got = qdelta.load(GOLDEN / "gguf" / f"{name}.gguf", quant="none")
    want = qdelta.load(TEXT / folder, quant="none")
    assert got.tokenizer.vocab_size == want.tokenizer.vocab_size
    assert got.stop_ids == want.stop_ids
    for case in CASES["text_cases"]:
        text = case["text"]
        assert got.encode(text) == want.encode(text), text
        assert got.encode(text, special=False) == want.encode(text, special=False), text
    # The converter calls <think> and its like control tokens, which decoding may leave out.
    ids = list(range(512))
    assert got.decode(ids, skip_special=False) == want.decode(ids, skip_special=False)
    messages = [{"role": "user", "content": "Hello <|im_end|>"}]
    assert got.render(messages) == want.render(messages)
    stated = {k: v for k, v in want.generation_config.items() if k in got.generation_config}
    assert got.generation_config == {
        **stated,
        "eos_token_id": got.generation_config["eos_token_id"],
    }
    assert set(got.generation_config) >= {"temperature", "top_k", "top_p"}


# --------------------------------------------------------------------------------- small files


def test_a_small_one():
    tokenizer = read(small())
    assert tokenizer.encode("ab<think> c<|im_end|>") == [3, 7, 4, 2, 6]
    assert tokenizer.decode([3, 7, 8, 6]) == "ab<think>"
    assert tokenizer.encode("[PAD8]") == []  # unused ids match no text, and no byte is known here
    assert tokenizer.vocab_size == 8


def test_characters_are_composed():
    """NFC is not written in the file."""
    tokens = ["\u00c3", "\u00a9", "\u00c3\u00a9", "e"]
    entries = small(tokens=tokens, token_type=[1] * 4, merges=["\u00c3 \u00a9"], eos_token_id=None,
                    padding_token_id=None)  # fmt: skip
    assert read(entries).encode("e\u0301") == [2]


@pytest.mark.parametrize("pre", ["qwen35", "qwen2", None])
def test_names_of_the_pre_tokenizer(pre):
    """Files of older programs name the family's before, or none; marks stay with their letters."""
    entries = {**real_metadata(), "tokenizer.ggml.pre": pre}
    text = "\u0915\u093f\u0924\u093e\u092c e\u0323"
    assert read(entries).encode(text) == real_tokenizer.tokenizer().encode(text)


@pytest.mark.parametrize("changes", [{"pre": "llama-bpe"}, {"model": "llama"}, {"model": "bert"}])
def test_other_tokenizers_are_unsupported(changes):
    with pytest.raises(qdelta.UnsupportedError) as caught:
        gguf.tokenizer_files(small(**changes).get, "x.gguf")
    message = str(caught.value)
    assert message.startswith("x.gguf: ") and repr(next(iter(changes.values()))) in message


def test_sampling_of_the_file():
    entries = small() | {
        "general.sampling.temp": 0.6000000238418579,
        "general.sampling.top_k": 20,
        "general.sampling.top_p": 0.949999988079071,
        "general.sampling.min_p": 0.0,
        "general.sampling.penalty_repeat": 1.0,
        "general.sampling.mirostat": 2,
    }
    assert parsed(entries, "generation_config.json") == {
        "eos_token_id": [5, 6],
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }


@pytest.mark.parametrize(
    ("changes", "ends"),
    [
        ({}, [5, 6]),
        ({"eos_token_id": None}, [5]),
        ({"eos_token_id": 5}, [5]),
        ({"eos_token_id": 0}, [0, 5]),
    ],
)
def test_end_tokens(changes, ends):
    assert parsed(small(**changes), "generation_config.json")["eos_token_id"] == ends


def test_no_template():
    assert read(small(**{"tokenizer.chat_template": None})).chat_template is None


LONG = "x" * 10_000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": None}, "`tokenizer.ggml.model`: missing; the file carries no tokenizer"),
        ({"model": 1}, "`tokenizer.ggml.model`: a text expected, found 1"),
        ({"pre": ["qwen35"]}, "`tokenizer.ggml.pre`: a text expected, found ['qwen35']"),
        ({"tokens": None}, f"`{TOKENS}`: missing"),
        ({"tokens": "abc"}, f"`{TOKENS}`: a list expected, of a text each, found 'abc'"),
        ({"tokens": LONG}, f"`{TOKENS}`: a list expected"),
        ({"tokens": list(range(9))}, f"`{TOKENS}`: a list expected, of a text each"),
        ({"tokens": []}, f"`{TYPES}`: 9 types of 0 tokens"),
        ({"tokens": list("aabcdefgh")}, f"`{TOKENS}`: 'a' is there twice"),
        ({"tokens": list("abcdeffgh")}, f"`{TOKENS}`: 'f' is there twice"),
        ({"tokens": [*"abcde", "", *"fgh"]}, f"`{TOKENS}`: the added token 5 is empty"),
        ({"token_type": None}, f"`{TYPES}`: missing"),
        ({"token_type": [1] * 8}, f"`{TYPES}`: 8 types of 9 tokens"),
        ({"token_type": [1] * 10}, f"`{TYPES}`: 10 types of 9 tokens"),
        ({"token_type": []}, f"`{TYPES}`: 0 types of 9 tokens"),
        ({"token_type": [1.0] * 9}, f"`{TYPES}`: a list expected, of a whole number each"),
        ({"token_type": [True] * 9}, f"`{TYPES}`: a list expected, of a whole number each"),
        ({"token_type": [2] * 9}, f"`{TYPES}`: token 0 has the type 2"),
        ({"token_type": [1] * 8 + [-7]}, f"`{TYPES}`: token 8 has the type -7"),
        ({"merges": None}, f"`{MERGES}`: missing"),
        ({"merges": [[1]]}, f"`{MERGES}`: a list expected, of a text each"),
        ({"merges": ["a b", "ab"]}, f"`{MERGES}`: entry 1 is 'ab', expected two tokens"),
        ({"merges": [""]}, f"`{MERGES}`: entry 0 is '', expected two tokens"),
        ({"merges": ["a b c"]}, f"`{MERGES}`: entry 0 is 'a b c', expected two tokens"),
        ({"merges": ["a  b"]}, f"`{MERGES}`: entry 0 is 'a  b', expected two tokens"),
        ({"merges": ["a b\nb c"]}, f"`{MERGES}`: entry 0 is "),
        ({"merges": ["a b\r"]}, f"`{MERGES}`: entry 0 is "),
        ({"merges": [LONG]}, f"`{MERGES}`: entry 0 is "),
        ({"merges": ["a x"]}, "not a usable tokenizer"),
        ({"merges": ["b a"]}, "not a usable tokenizer"),
        ({"merges": ["#version b"]}, "not a usable tokenizer"),
        ({"eos_token_id": 9}, "`tokenizer.ggml.eos_token_id`: 9, expected a token id below 9"),
        ({"eos_token_id": -1}, "`tokenizer.ggml.eos_token_id`: -1, expected a token id below 9"),
        ({"eos_token_id": 2**64 - 1}, "expected a token id below 9"),
        ({"eos_token_id": "6"}, "eos_token_id`: a whole number expected, found '6'"),
        ({"eos_token_id": True}, "a whole number expected, found True"),
        ({"padding_token_id": 1.5}, "`tokenizer.ggml.padding_token_id`: a whole number expected"),
        ({"bos_token_id": 99}, "`tokenizer.ggml.bos_token_id`: 99"),
        ({"tokenizer.chat_template": 1}, "`tokenizer.chat_template`: a text expected, found 1"),
        ({"tokenizer.chat_template": ["x"]}, "`tokenizer.chat_template`: a text expected"),
    ],
)  # fmt: skip
def test_damaged_metadata(changes, words):
    with pytest.raises(qdelta.FileError) as caught:
        read(small(**changes))
    message = str(caught.value)
    assert words in message and len(message) < 300
    assert message.startswith("x.gguf: key `") or "not a usable tokenizer" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [("temp", "warm"), ("temp", -1.0), ("temp", float("nan")), ("top_k", 0.5), ("top_p", 2.0),
     ("top_k", [20]), ("min_p", True), ("penalty_repeat", 0.0)],
)  # fmt: skip
def test_damaged_sampling(key, value):
    """Found when the model is loaded, as in generation_config.json."""
    from qdelta import profiles

    found = parsed(small() | {f"general.sampling.{key}": value}, "generation_config.json")
    with pytest.raises(qdelta.FileError, match=r"generation_config\.json: "):
        profiles.profiles({}, found)


def test_damage_at_random():
    """Any value in any place: a tokenizer, or an error of ours."""
    rng = random.Random(5)
    plain = (None, 0, -1, 2**40, 1.5, float("nan"), True, "", "a b", LONG, "\x00")
    lists = ([], [1], ["a"], [None], [[]], *([x] * 9 for x in (2**40, "", "a b", 1, 3, 4, 5)))
    values = (*plain, *lists)
    keys = [*small(), "tokenizer.ggml.bos_token_id", "general.sampling.temp"]
    failed = 0
    for _ in range(3000):
        entries = small()
        for key in rng.sample(keys, rng.randrange(1, 4)):
            if isinstance(entries.get(key), list) and rng.random() < 0.5:
                entries[key] = list(entries[key])
                entries[key][rng.randrange(len(entries[key]))] = rng.choice(values)
            else:
                entries[key] = rng.choice(values)
        try:
            read(entries)
        except (qdelta.FileError, qdelta.UnsupportedError):
            failed += 1
    assert 1000 < failed < 3000


# ----------------------------------------------------------------------------------- writing


def tiny_files(**changes: Callable[[dict[str, Any]], object]) -> dict[str, bytes]:
    """Files of the tiny tokenizer; a change edits the JSON of a file named without its end."""
    files = tokenizer_files(TEXT / "tiny-f32")
    for stem, change in changes.items():
        value = json.loads(files[f"{stem}.json"])
        change(value)
        files[f"{stem}.json"] = json.dumps(value).encode()
    return files


def written_metadata(files: dict[str, bytes], vocab_size: int = 512) -> Entries:
    return dict(gguf.metadata(files, name="n", licence="mit", vocab_size=vocab_size))


def test_a_vocabulary_larger_than_the_model():
    files = tiny_files()
    size = qdelta.Tokenizer.from_files(files).vocab_size
    assert written_metadata(files, size)[TOKENS][-1] != f"[PAD{size - 1}]"
    with pytest.raises(
        qdelta.FileError, match=f"{size} ids, the embedding has rows for {size - 1}"
    ):
        written_metadata(files, size - 1)


def test_licence_and_name():
    entries = written_metadata(tiny_files())
    assert entries["general.name"] == "n" and entries["general.license"] == "mit"
    without = gguf.metadata(tiny_files(), name="n", licence=None, vocab_size=512)
    assert "general.license" not in dict(without)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (
            "---\nlibrary_name: x\nlicense: apache-2.0\nlicense_link: y\n---\n# Model\n",
            "apache-2.0",
        ),
        ("---\nlicense: mit\n---", "mit"),
        ("# Model\nlicense: mit\n---\n", None),
        ("---\nname: x\n---\nlicense: mit\n---\n", None),
        ("---\nlicense: mit\n", None),
        ("", None),
        (b"---\nlicense: \xff\n---\n", None),
        (None, None),
    ],
)
def test_the_licence_is_that_of_the_card(card, licence, tmp_path):
    folder = make_checkpoint(tmp_path / "model")
    if card is not None:
        content = card if isinstance(card, bytes) else card.encode()
        (folder / "README.md").write_bytes(content)
    out = tmp_path / "out.gguf"
    weights.convert_to_gguf(_native.Checkpoint(str(folder)), folder, out, dtype="F32")
    source = _native.Checkpoint(str(out))
    assert source.gguf_value("general.license") == licence
    assert source.gguf_value("general.name") == "model"
    weights.convert_to_gguf(source, out, tmp_path / "again.gguf", dtype="BF16")
    again = _native.Checkpoint(str(tmp_path / "again.gguf"))
    assert again.gguf_value("general.license") == licence


def test_sampling_is_written():
    def change(config):
        config.clear()
        config.update(temperature=1, top_k=-1, top_p=0.5, min_p=0.25, repetition_penalty=1.5)

    entries = written_metadata(tiny_files(generation_config=change))
    sampling = {k: v for k, v in entries.items() if k.startswith("general.sampling.")}
    assert sampling == {
        "general.sampling.temp": 1.0,
        "general.sampling.top_k": 0,
        "general.sampling.top_p": 0.5,
        "general.sampling.min_p": 0.25,
        "general.sampling.penalty_repeat": 1.5,
    }
    assert type(sampling["general.sampling.temp"]) is float


@pytest.mark.parametrize(
    "value", [{"temperature": "hot"}, {"top_k": 1e400}, {"top_p": -1}, {"top_k": [1]}]
)
def test_settings_that_are_none_are_not_written(value):
    files = tiny_files(generation_config=lambda config: config.update(value))
    with pytest.raises(qdelta.FileError, match=r"generation_config\.json: "):
        written_metadata(files)


def test_a_large_top_k_fits(tmp_path):
    folder = make_checkpoint(tmp_path / "model")
    (folder / "generation_config.json").write_text('{"top_k": 123456789012345678901234567890}')
    out = tmp_path / "out.gguf"
    weights.convert_to_gguf(_native.Checkpoint(str(folder)), folder, out, dtype="F32")
    assert _native.Checkpoint(str(out)).gguf_value("general.sampling.top_k") == 2**31 - 1
