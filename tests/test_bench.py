"""`qdelta bench`: ceilings, and other programs measured in turn."""

import json
import os
import stat
import sys

import pytest

import qdelta
import qdelta.source
from qdelta import _native, bench
from qdelta.sizes import SIZES, parameters

LIMITS = {"read_one": 20e9, "read_all": 40e9, "int8_peak": 800e9, "f32_peak": 200e9}

# Parameters of the text models, as their index files have them.
PARAMETERS = {
    "0.8B": 752_393_024,
    "2B": 1_881_825_088,
    "4B": 4_205_751_296,
    "9B": 8_953_803_264,
}


@pytest.fixture(scope="module")
def demo():
    return bench.load_file(qdelta.source.locate("demo"), quant="none", threads=2)


def test_parameters_of_the_released_sizes():
    assert {name: parameters(config) for name, config in SIZES.items()} == PARAMETERS


def test_limits_are_measured():
    limits = bench.measure_limits(_native.instruction_sets()[0], 2)
    assert set(limits) == set(LIMITS)
    assert all(value > 0 for value in limits.values())
    with pytest.raises(qdelta.ArgumentError, match="threads"):
        bench.measure_limits(_native.instruction_sets()[0], 0)


def test_decode_ceiling_is_memory_over_bytes(demo):
    model, config = demo
    near, far = (bench.Test(0, 2, depth) for depth in (0, 1024))
    plan = model.memory_plan(1)
    want = 40e9 / (model.weight_bytes + 2 * plan["state"] + plan["kv"])
    assert bench.ceiling(model, near, config, LIMITS) == pytest.approx(want)
    assert bench.ceiling(model, far, config, LIMITS) < want


def test_prefill_ceiling_falls_with_depth_and_grows_with_arithmetic(demo):
    model, config = demo
    near, far = (bench.Test(128, 0, depth) for depth in (0, 1024))
    ceiling = bench.ceiling(model, near, config, LIMITS)
    assert bench.ceiling(model, far, config, LIMITS) < ceiling
    # Unquantised weights are multiplied in f32.
    twice = {**LIMITS, "f32_peak": 400e9}
    assert bench.ceiling(model, near, config, twice) == pytest.approx(2 * ceiling)


@pytest.fixture
def peer(tmp_path):
    """A program that answers like llama-bench, with the rate that the file's text says."""
    program = tmp_path / "llama-bench"
    program.write_text(
        f"#!{sys.executable}\n"
        "import json, sys\n"
        "args = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "text = open(args['-m']).read()\n"
        "if text == 'fail': sys.exit('cannot load the model')\n"
        "if text == 'noise': sys.exit(print('hello'))\n"
        "n = {'n_prompt': int(args['-p']), 'n_gen': int(args['-n'])}\n"
        "row = {**n, 'avg_ts': float(text), 'model_type': 'other', 'model_size': 7}\n"
        "print(json.dumps([row]))\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    model = tmp_path / "model.gguf"
    model.write_text("2.0")
    return program, model


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a script with a #! line")
def test_another_program_is_measured_in_turn(demo, peer):
    model, config = demo
    against = bench.Peer(*map(str, peer))
    row, theirs = bench.run(
        model, bench.Test(16, 0, 0), repetitions=3, filename="demo", config=config, against=against
    )
    assert theirs.samples_ts == [2.0, 2.0, 2.0]
    assert theirs.ratio == pytest.approx(sorted(row.samples_ts)[1] / 2.0)
    assert theirs.ratio_min <= theirs.ratio <= theirs.ratio_max
    assert "other" in bench.format_rows([row], "md", [theirs])
    entries = json.loads(bench.format_rows([row], "json", [theirs]))
    assert [entry.get("ratio") for entry in entries] == [None, theirs.ratio]


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a script with a #! line")
@pytest.mark.parametrize(
    "text, message", [("fail", "cannot load the model"), ("noise", "not llama-bench's JSON")]
)
def test_another_program_that_fails_is_an_error(peer, text, message):
    program, model = peer
    model.write_text(text)
    with pytest.raises(qdelta.Error, match=message):
        bench.Peer(str(program), str(model)).sample(bench.Test(0, 1, 0), 1)


def test_another_program_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(qdelta.ArgumentError, match="no such program"):
        bench.Peer(str(tmp_path / "none"), __file__)
    with pytest.raises(qdelta.FileAccessError, match="no such file"):
        bench.Peer(sys.executable, str(tmp_path / "none.gguf"))


def test_samples_are_set_against_limits_of_their_moment(demo, monkeypatch):
    model, config = demo
    measured = iter([LIMITS, {**LIMITS, "read_all": 10e9}, {**LIMITS, "read_all": 20e9}])
    monkeypatch.setattr(bench, "measure_limits", lambda isa, threads: next(measured))
    test = bench.Test(0, 4, 0)
    row, _ = bench.run(model, test, repetitions=3, filename="demo", config=config, limits=True)
    moved = bench.bytes_per_token(model, 2)
    pairs = zip(row.samples_ts, (40e9, 10e9, 20e9), strict=True)
    assert row.of_ceiling == pytest.approx(sorted(rate * moved / read for rate, read in pairs)[1])
    assert row.limits["read_all"] == 20e9
    assert "of ceiling" in bench.format_rows([row], "md")
