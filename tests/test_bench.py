"""`qdelta bench`: ceilings, and other programs measured in turn."""

import copy
import csv
import io
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import qdelta
import qdelta.source
from qdelta import _native, bench, costs, plots, profiling, report
from qdelta.cli import cli
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


def text_of(to: report.Report, *rows: bench.Row) -> str:
    return "\n".join([*map(to.add, rows), to.end()])


def test_parameters_of_the_released_sizes():
    assert {name: parameters(config) for name, config in SIZES.items()} == PARAMETERS


def test_limits_are_measured():
    limits = bench.measure_limits(_native.instruction_sets()[0], 2)
    assert set(limits) == set(LIMITS)
    assert all(value > 0 for value in limits.values())
    with pytest.raises(qdelta.ArgumentError, match="threads"):
        bench.measure_limits(_native.instruction_sets()[0], 0)


@pytest.mark.parametrize(
    ("kernel", "arguments", "names"),
    [
        ("matmul", ("w9", 16, 64, 1, 1), "w8"),
        ("matmul", ("w8", 16, 64, 1, 1, "l3"), "no, l1, l2, once"),
        ("attention", ("f32", 1, 1), "q8 or f16"),
    ],
)
def test_kernels_name_what_they_know(kernel, arguments, names):
    with pytest.raises(qdelta.ArgumentError, match=names):
        getattr(_native.kernels, kernel)("portable", *arguments)


def test_decode_ceiling_is_memory_over_bytes(demo):
    model, config = demo
    near, far = (bench.Test(0, 2, depth) for depth in (0, 1024))
    plan = model.memory_plan(1)
    want = 40e9 / (model.weight_bytes + plan.state + plan.kv)
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
    """A program that answers like llama-bench: the rate is what the file's text says, of GGUF 3."""
    program = tmp_path / "llama-bench"
    program.write_text(
        f"#!{sys.executable}\n"
        "import json, sys\n"
        "args = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "data = open(args['-m'], 'rb').read()\n"
        "text = '3.0' if data.startswith(b'GGUF') else data.decode()\n"
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
    row = bench.run(
        model, bench.Test(16, 0, 0), repetitions=3, filename="demo", config=config, against=against
    )
    theirs = row.against
    assert theirs.samples_ts == [2.0, 2.0, 2.0]
    assert theirs.ratio == pytest.approx(sorted(row.samples_ts)[1] / 2.0)
    assert theirs.ratio_min <= theirs.ratio <= theirs.ratio_max
    assert f"| other  | 2.00 ± 0.00 | {theirs.ratio:.2f} (" in text_of(report.Markdown(), row)
    (entry,) = json.loads(text_of(report.Json(), row))
    assert entry["against"]["ratio"] == theirs.ratio


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a script with a #! line")
@pytest.mark.parametrize(
    "text, message", [("fail", "cannot load the model"), ("noise", "not llama-bench's JSON")]
)
def test_another_program_that_fails_is_an_error(peer, text, message):
    program, model = peer
    model.write_text(text)
    with pytest.raises(qdelta.Error, match=message):
        bench.Peer(str(program), str(model)).sample(bench.Test(0, 1, 0), 1)


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a script with a #! line")
def test_another_program_reads_the_same_gguf_file(peer, tmp_path):
    program, _ = peer
    file = Path(__file__).parent / "golden/gguf/tiny-k256-bf16-Q8_0.gguf"
    options = ["-p", 8, "-n", 0, "-r", 1, "--cache", tmp_path, "-o", "json", "--against", program]
    result = run_bench(file, *options)
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert row["against"]["samples_ts"] == [3.0]
    # No other model is a GGUF file.
    converted = tmp_path / "model.safetensors"
    converted.touch()
    for args in (["demo", *options], [converted, *options], ["--synthetic", "0.8B", *options],
                 ["demo", "--against-model", file]):  # fmt: skip
        result = run_bench(*args)
        assert result.exit_code == 2 and "--against-model" in result.output


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
    row = bench.run(model, test, repetitions=3, filename="demo", config=config, limits=True)
    assert model.settled
    moved = bench.bytes_per_token(model, 2)
    pairs = zip(row.samples_ts, (40e9, 10e9, 20e9), strict=True)
    assert row.of_ceiling == pytest.approx(sorted(rate * moved / read for rate, read in pairs)[1])
    assert row.limits["read_all"] == 20e9
    assert "| of ceiling |" in text_of(report.Markdown(limits=True), row)


# ------------------------------------------------------------------------------------- profiles


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("test", [bench.Test(70, 0, 0), bench.Test(0, 6, 0), bench.Test(0, 6, 300)])
def test_a_profile_accounts_for_all_time(threads, test):
    model, config = bench.load_file(qdelta.source.locate("demo"), quant="w8", threads=threads)
    parts = profiling.profile(bench.Trial(model, test), config, 2)
    assert tuple(parts) == profiling.PARTS
    assert sum(part.share for part in parts.values()) == pytest.approx(1, abs=1e-9)
    for name, part in parts.items():
        # A clock inside another may not read more than it.
        assert part.share >= (-1e-9 if name in ("synchronisation", "other") else 1e-9), name
    rates = {name for name, part in parts.items() if part.gb_per_s or part.gop_per_s}
    assert rates == {"matrices", "delta_rule", "attention"} | ({"head"} if test.n_gen else set())
    # Seconds, bytes and operations of a part fit each other.
    if test.n_gen:
        moved = costs.decode_bytes(model, test.n_depth + 3)
        assert sum(moved.values()) == bench.bytes_per_token(model, test.n_depth + 3)
        head = parts["head"]
        assert head.gb_per_s * head.us_per_token * 1e3 == pytest.approx(moved["head"])


@pytest.mark.parametrize(("quant", "block"), [("w8", 1088), ("w4", 704)])
def test_a_screened_head_is_measured_where_it_works(quant, block):
    full, screened = (
        bench.load_file(qdelta.source.locate("demo"), quant=quant, threads=2, head=head)
        for head in ("full", "screened")
    )
    bytes = [model.head_bytes for model, _ in (full, screened)]
    assert bytes[1] == bytes[0] * 576 // block  # the blocks of the planes, as docs/formats.md says
    weights = [model.weight_bytes for model, _ in (full, screened)]
    assert weights[0] - weights[1] == bytes[0] - bytes[1]
    model, config = screened
    row = bench.run(
        model, bench.Test(0, 4, 0), repetitions=2, filename="demo", config=config, profiled=True
    )
    assert model.settled and not full[0].settled
    assert row.head == "screened" and row.model_type.endswith(f"{quant} screened")
    assert row.bytes_per_token < bench.bytes_per_token(full[0], 2)
    assert row.profile["sampling"].gb_per_s and row.profile["head"].gb_per_s is None
    trial = bench.Trial(model, bench.Test(3, 0, 0))
    asked = []
    trial._screen = asked.append
    trial.sample()
    assert len(asked) == 1


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_profiles_change_no_result(threads):
    model, _ = bench.load_file(qdelta.source.locate("demo"), quant="none", threads=threads)
    results = []
    for profiled in (False, True):
        session = model.session()
        if profiled:
            session.start_profile()
        session.feed(np.arange(300, dtype=np.int32))
        session.feed(np.arange(1, dtype=np.int32))
        results.append(session.logits())
        if profiled:
            seconds = session.stop_profile()
            assert set(seconds) < set(profiling.PARTS) and seconds["matrices"] > 0
    np.testing.assert_array_equal(*results)
    with pytest.raises(qdelta.ArgumentError, match="no profile was started"):
        session.stop_profile()


# ---------------------------------------------------------------------------- reports and plots


@pytest.fixture(scope="module")
def row(demo):
    """A decode test with everything measured, but for the other program."""
    model, config = demo
    return bench.run(
        model,
        bench.Test(0, 4, 0),
        repetitions=2,
        filename="demo",
        config=config,
        limits=True,
        profiled=True,
    )


def with_peer(row: bench.Row) -> bench.Row:
    row = copy.deepcopy(row)
    row.against = bench.PeerResult(
        "/bin/llama-bench", "theirs", 1, 50.0, 5.0, [50.0], 2.0, 1.8, 2.1
    )
    return row


def at_depth(row: bench.Row, depth: int) -> bench.Row:
    row = copy.deepcopy(row)
    row.n_depth = depth
    return row


@pytest.mark.parametrize("form", [report.Json, report.JsonLines])
def test_rows_are_read_as_they_were_written(row, form, tmp_path):
    rows = [row, with_peer(at_depth(row, 64))]
    file = tmp_path / "rows"
    file.write_text(text_of(form(), *rows))
    assert report.read_rows(file) == rows


def test_csv_has_every_field(row):
    (entry,) = csv.DictReader(io.StringIO(text_of(report.Csv(), row).strip()))
    assert json.loads(entry["profile"])["head"]["share"] == row.profile["head"].share
    assert entry["against"] == "" and json.loads(entry["limits"]) == row.limits


def test_profile_table(row):
    lines = text_of(report.Markdown(), row).splitlines()
    at = lines.index(f"tg4, {row.model_type}, 2 threads: where the time goes")
    assert lines[at + 2].split()[1::2] == ["part", "share", "us/token", "GB/s"]
    shown = [line.strip("|").split("|")[0].strip() for line in lines[at + 4 :]]
    assert shown[:8] == [report.label(name) for name in profiling.PARTS[:8]]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda e: e.pop("avg_ts"), "entry 0: no `avg_ts`"),
        (lambda e: e.update(n_depth="deep"), '`n_depth` is "deep", expected int'),
        (lambda e: e.update(against=[]), "entry 0: against: \\[\\], expected an object"),
        (lambda e: e.update(profile=3), "`profile` is not an object"),
        (lambda e: e["profile"].pop("norms"), "profile: norms: null, expected an object"),
        (lambda e: e["profile"]["norms"].update(share=True), "`share` is true, expected float"),
    ],
)
def test_rows_of_something_else_are_an_error(row, change, message, tmp_path):
    (entry,) = json.loads(text_of(report.Json(), row))
    change(entry)
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([entry]))
    with pytest.raises(qdelta.FileError, match=message):
        report.read_rows(file)


@pytest.mark.parametrize("content", [b"\xff", b"hello", b"[1]", b"[{}]"])
def test_files_of_something_else_are_an_error(content, tmp_path):
    file = tmp_path / "rows.json"
    file.write_bytes(content)
    with pytest.raises(qdelta.FileError, match=r"rows\.json: "):
        report.read_rows(file)


def test_a_plot_has_the_panels_that_rows_fill(row, tmp_path):
    """Titles, axes, labels and footer, which an SVG has as comments."""
    file = tmp_path / "plot.svg"
    plain = copy.deepcopy(row)
    plain.of_ceiling = plain.profile = None

    def drawn(*rows: bench.Row) -> str:
        plots.plot(rows, file)
        return file.read_text()

    prompt = copy.deepcopy(plain)
    prompt.n_prompt, prompt.n_gen = 4, 0
    depths, compared = "Decoding after other tokens", "Decoding: two programs, measured in turn"
    ceiling, profile = "Part of what the machine could do", "Where the time goes"
    titles = {"Reading a prompt", "Decoding", depths, compared, ceiling, profile}
    for expected, rows in (
        ({"Decoding"}, [plain]),
        ({"Reading a prompt", "Decoding"}, [prompt, plain]),
        ({depths}, [plain, at_depth(plain, 64)]),
        ({compared}, [with_peer(plain)]),
        ({"Decoding", ceiling, profile}, [row]),
        ({depths, compared, ceiling, profile}, [with_peer(row), at_depth(row, 64)]),
    ):
        text = drawn(*rows)
        assert {title for title in titles if f"<!-- {title} -->" in text} == expected
        name = row.model_type.removeprefix("qwen35 ")
        assert f"<!-- {name}, tg4, 2 threads" in text
        assert f"<!-- qdelta {qdelta.__version__}, {row.test_time[:10]} -->" in text
    for deviations in (0, 1, 3):
        spread = with_peer(row)
        spread.stddev_ts = deviations * row.avg_ts
        assert "2.00× (1.80 to 2.10) theirs" in drawn(spread)
    assert drawn(row) == drawn(row)


def test_png(row, tmp_path):
    file = tmp_path / "plot.PNG"
    plots.plot([row], file)
    assert file.read_bytes().startswith(b"\x89PNG")


def run_bench(*args: object):
    return CliRunner().invoke(cli, ["bench", *map(str, args)])


def test_plot_is_checked_before_the_benchmark(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "run", lambda *_, **__: pytest.fail("nothing is to be measured"))
    result = run_bench("demo", "--plot", tmp_path / "plot.pdf")
    assert result.exit_code == 2 and "ends in .svg or .png" in result.output
    result = run_bench("demo", "--plot", tmp_path / "none" / "plot.svg")
    assert isinstance(result.exception, qdelta.FileAccessError)
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    result = run_bench("demo", "--plot", tmp_path / "plot.svg")
    assert isinstance(result.exception, qdelta.Error)
    assert "pip install 'qdelta[plot]'" in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_plot_of_saved_results_and_of_this_run(row, tmp_path):
    saved, file = tmp_path / "saved.json", tmp_path / "plot.svg"
    saved.write_text(text_of(report.Json(), row))
    result = run_bench("--plot", file, "--from", saved, "--from", saved)
    assert (result.exit_code, result.output) == (0, ""), result.output
    name = f"<!-- {row.model_type.removeprefix('qwen35 ')}, tg4, 2 threads -->"
    alone = file.read_text()
    assert name in alone and "pp8" not in alone
    args = ("demo", "-p", 8, "-n", 0, "-r", 1, "-o", "json", "--profile")
    result = run_bench(*args, "--plot", file, "--from", saved)
    assert result.exit_code == 0, result.output
    assert [entry["n_prompt"] for entry in json.loads(result.stdout)] == [8]
    both = file.read_text()
    assert name in both and "pp8" in both
    assert run_bench("--from", saved).exit_code == 2
    saved.write_text("[]")
    assert run_bench("--plot", file, "--from", saved).exit_code == 2


@pytest.mark.parametrize("form", ["md", "json", "jsonl", "csv"])
def test_what_was_measured_survives_an_interruption(form, monkeypatch, tmp_path):
    whole = bench.run

    def interrupted(model, test, **settings):
        if test.n_gen:
            raise KeyboardInterrupt
        return whole(model, test, **settings)

    monkeypatch.setattr(bench, "run", interrupted)
    file = tmp_path / "plot.png"
    result = run_bench("demo", "-p", 8, "-n", 8, "-r", 1, "-o", form, "--plot", file)
    assert result.exit_code != 0 and file.exists()
    if form == "md":
        assert "| pp8 " in result.stdout
    elif form == "csv":
        assert (
            len(list(csv.DictReader(io.StringIO(result.stdout.split("Aborted")[0].strip())))) == 1
        )
    else:
        entries = json.loads(result.stdout)
        assert (entries[0] if form == "json" else entries)["n_prompt"] == 8
    result = run_bench("demo", "-p", 0, "-n", 8, "-r", 1, "-o", form)
    assert result.exit_code != 0 and "[" not in result.stdout


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for one process there")
def test_rows_come_as_they_are_done_and_ctrl_c_ends_with_130():
    command = [sys.executable, "-m", "qdelta", "bench", "demo", "-p", "8", "-n", "1000000"]
    command += ["-r", "1", "-t", "1", "-o", "jsonl"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        first = json.loads(process.stdout.readline())  # while the second test runs on and on
        process.send_signal(signal.SIGINT)
        rest, error = process.communicate(timeout=60)
    assert first["n_prompt"] == 8 and rest == b""
    assert process.returncode == 130 and b"Traceback" not in error
