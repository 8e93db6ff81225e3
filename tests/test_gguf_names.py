"""Which GGUF models a repository holds, by the names of its files."""

from __future__ import annotations

import pytest

import qdelta
from qdelta import gguf_names

REPO = "unsloth/Qwen3.5-4B-GGUF"
FILES = {
    "README.md": 10,
    "config.json": 10,
    "Qwen3.5-4B-Q4_K_M.gguf": 300,
    "Qwen3.5-4B-Q8_0.gguf": 500,
    "Qwen3.5-4B-UD-Q4_K_XL.gguf": 310,
    "Qwen3.5-4B-UD-IQ2_M.gguf": 200,
    "Qwen3.5-4B-IQ4_XS.gguf": 250,
    "BF16/Qwen3.5-4B-BF16-00001-of-00002.gguf": 500,
    "BF16/Qwen3.5-4B-BF16-00002-of-00002.gguf": 400,
    "mmproj-F16.gguf": 50,
    "mmproj-BF16.gguf": 50,
    "mtp-Qwen3.5-4B-Q4_K_M.gguf": 30,
}
HERE = {"Q4_K_M", "Q8_0", "UD-Q4_K_XL", "UD-IQ2_M", "IQ4_XS", "BF16"}


def test_models_of_a_repository():
    found = {model.type: model for model in gguf_names.models(FILES)}
    assert set(found) == HERE
    assert found["BF16"].bytes == 900 and found["BF16"].whole
    assert found["BF16"].files == tuple(sorted(f for f in FILES if f.startswith("BF16/")))


@pytest.mark.parametrize(
    ("name", "type"),
    [
        ("qwen3.5-4b.Q5_K_M.gguf", "Q5_K_M"),
        ("Qwen3.5-4B.i1-IQ3_XXS.gguf", "IQ3_XXS"),
        ("qwen3.5-4b-instruct-q4_k_m.gguf", "Q4_K_M"),
        ("model_Q6_K.gguf", "Q6_K"),
        ("tiny-f32-F32.GGUF", "F32"),
        ("Q4_0/x-fp16.gguf", "FP16"),
        ("Qwen3.5-4B-MXFP4_MOE.gguf", "MXFP4_MOE"),
        ("Qwen3.5-4B.gguf", "Qwen3.5-4B"),
        ("Q8_0.gguf", "Q8_0"),
    ],
)
def test_types(name: str, type: str):
    assert [model.type for model in gguf_names.models({name: 1})] == [type]


@pytest.mark.parametrize(
    "name", ["mmproj-Q8_0.gguf", "a/mmproj-x.gguf", "Qwen3.5-mmproj-F32.gguf", "mtp-x-Q8_0.gguf",
             "x-MTP-Q8_0.gguf", "x.gguf.part", "x.safetensors"]
)  # fmt: skip
def test_what_is_no_model(name: str):
    assert gguf_names.models({name: 1}) == []


@pytest.mark.parametrize(
    ("wanted", "first"),
    [
        ("Q4_K_M", "Qwen3.5-4B-Q4_K_M.gguf"),
        ("q4_k_m", "Qwen3.5-4B-Q4_K_M.gguf"),
        ("UD-Q4_K_XL", "Qwen3.5-4B-UD-Q4_K_XL.gguf"),
        ("Q4_K_XL", "Qwen3.5-4B-UD-Q4_K_XL.gguf"),
        ("bf16", "BF16/Qwen3.5-4B-BF16-00001-of-00002.gguf"),
        ("Qwen3.5-4B-IQ4_XS", "Qwen3.5-4B-IQ4_XS.gguf"),
    ],
)
def test_choice(wanted: str, first: str):
    assert gguf_names.choose(FILES, wanted, REPO).files[0] == first


@pytest.mark.parametrize("wanted", ["Q5_K_M", "F16", "Q4", "Q4_K", "mmproj-F16", "4B", "K_M"])
def test_what_is_not_there_lists_what_is(wanted: str):
    with pytest.raises(qdelta.ArgumentError) as caught:
        gguf_names.choose(FILES, wanted, REPO)
    message = str(caught.value)
    assert REPO in message and repr(wanted) in message
    assert all(type in message for type in HERE) and "mmproj-BF16" not in message
    assert message.count("GiB") == len(HERE)


def test_an_unclear_type_can_be_told_by_the_stem():
    files = {"base/x-Q4_K_M.gguf": 1, "chat/x-Q4_K_M.gguf": 2, "x-Q8_0.gguf": 3}
    with pytest.raises(qdelta.ArgumentError, match="several files") as caught:
        gguf_names.choose(files, "Q4_K_M", REPO)
    assert "base/x-Q4_K_M (" in str(caught.value) and "Q8_0" not in str(caught.value)
    assert gguf_names.choose(files, "chat/x-Q4_K_M", REPO).bytes == 2


def test_no_files_at_all():
    with pytest.raises(qdelta.ArgumentError, match="it has no GGUF files"):
        gguf_names.choose({"model.safetensors": 1}, "Q8_0", REPO)


def test_a_missing_part():
    files = {name: size for name, size in FILES.items() if "00002-of" not in name}
    with pytest.raises(qdelta.ArgumentError, match="1 of its 2 parts"):
        gguf_names.choose(files, "BF16", REPO)
