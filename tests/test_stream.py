"""Streams: what leaves when, and every way to end one.

Answers are scripted: a logits processor lets the demo model say exactly the given tokens.
"""

from __future__ import annotations

import _thread
import asyncio
import itertools
import random
import threading
import time

import numpy as np
import pytest

import qdelta
from qdelta.reply import ReasoningSplitter, StopStrings, opens_reasoning

ASK = [{"role": "user", "content": "Hello!"}]


@pytest.fixture(scope="module")
def model() -> qdelta.Model:
    return qdelta.load("demo", quant="none", threads=2, progress=False)


def cuts(text: str) -> list[list[str]]:
    """Ways to cut a text: whole, single characters, every pair of places, some at random."""
    ways = [[text], list(text)]
    for i, j in itertools.combinations_with_replacement(range(len(text) + 1), 2):
        ways.append([text[:i], text[i:j], text[j:]])
    rng = random.Random(len(text))
    for _ in range(30):
        places = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(8)))
        edges = zip([0, *places], [*places, len(text)], strict=True)
        ways.append([text[i:j] for i, j in edges])
    return ways


# Reasoning and answer


def split(opened: bool, pieces: list[str]) -> tuple[str, str]:
    splitter = ReasoningSplitter(opened)
    parts = [part for piece in pieces for part in splitter.push(piece)] + splitter.finish()
    assert all(text for _, text in parts)
    kinds = [kind for kind, _ in parts]
    assert kinds == sorted(kinds)  # reasoning, then text
    both = ["".join(text for kind, text in parts if kind == want) for want in ("reasoning", "text")]
    return both[0], both[1]


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("r\n</think>\n\na", "r", "a"),
        ("r  \n\n </think> \n a b\n", "r", "a b\n"),
        ("r</think>", "r", ""),
        ("r</think>\n\n", "r", ""),
        ("</think>a", "", "a"),
        ("\n\n</think>\n\na", "", "a"),
        ("<think>\nr\n</think>\n\na", "r", "a"),
        (" <think> r</think>a", "r", "a"),
        ("<think></think>", "", ""),
        ("<think><think>r</think>a", "<think>r", "a"),
        ("  r</think>a", "  r", "a"),
        ("r", "r", ""),
        ("r \n", "r \n", ""),
        ("r </thin", "r </thin", ""),
        ("<thin", "<thin", ""),
        ("<thinker>x</think>a", "<thinker>x", "a"),
        ("a </ b </think c </think>d", "a </ b </think c", "d"),
        ("r</think></think>a", "r", "a"),
        ("r</think>\n</think>\na</think>b", "r", "a</think>b"),
        ("r</think>a<think>b</think>c", "r", "a<think>b</think>c"),
        ("r</think>\n </thi", "r", "</thi"),
        ("", "", ""),
    ],
)
def test_reasoning(text, reasoning, answer):
    for pieces in cuts(text):
        assert split(True, pieces) == (reasoning, answer), pieces


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("a", "a"),
        ("  a ", "  a "),
        ("</think>a", "a"),
        (" </think>\n\na", "a"),
        ("</think></think>a", "</think>a"),
        ("a</think>b", "a</think>b"),
        ("</thi", "</thi"),
        ("\n", "\n"),
        ("<think>r</think>a", "<think>r</think>a"),
        ("", ""),
    ],
)
def test_answer_without_reasoning(text, answer):
    for pieces in cuts(text):
        assert split(False, pieces) == ("", answer), pieces


def test_reasoning_leaves_as_it_comes():
    """Only white space and the beginnings of a tag wait."""
    splitter = ReasoningSplitter(True)
    got = [
        splitter.push(piece) for piece in ("I ", "see", " <", "b>", "\n", "</thi", "nk>", "\n", "A")
    ]
    parts = [[text for _, text in out] for out in got]
    assert parts == [["I"], [" see"], [], [" <b>"], [], [], [], [], ["A"]]


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>assistant\n", False),
        ("", False),
    ],
)
def test_prompts_that_open_reasoning(prompt, opened):
    assert opens_reasoning(prompt) == opened


# Stop strings


def find_stop(text: str, stops: list[str]) -> str | None:
    """What precedes the stop that is complete first, the slow way."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return None


@pytest.mark.parametrize(
    "stops", [["ab"], ["aab", "b"], ["abc", "b"], ["aa", "aaa"], ["ba", "c", "cab"]]
)
def test_stop_strings(stops):
    for text in map("".join, itertools.product("abc", repeat=5)):
        before = find_stop(text, stops)
        for pieces in ([text], list(text), [text[:2], text[2:]], [text[:3], text[3:]]):
            matcher = StopStrings(stops)
            out = ""
            for piece in pieces:
                out += matcher.push(piece)
                if matcher.found:
                    break
            assert matcher.found == (before is not None)
            assert out + ("" if matcher.found else matcher.finish()) == (
                text if before is None else before
            )


def test_only_possible_stops_wait():
    matcher = StopStrings(["\n\nUser:", "END"])
    pieces = ["A", "E", "N", "x", "\n", "\n", "U", "B", "\n\nUse", "r:", "more"]
    got = [matcher.push(piece) for piece in pieces[:10]]
    assert got == ["A", "", "", "ENx", "", "", "", "\n\nUB", "", ""]
    assert matcher.found


# Scripted answers


def script(model, text: str | list[int]):
    """A processor that lets the model say `text`, then end its turn."""
    ids = model.encode(text) if isinstance(text, str) else text
    left = iter([*ids, *[model.tokenizer.token_id("<|im_end|>")] * 10_000])

    def say(ids, row):
        row[:] = -np.inf
        row[next(left)] = 0.0
        return row

    return say


def events_of(stream) -> tuple[list[tuple[str, str]], qdelta.Message | qdelta.Completion]:
    events = list(stream)
    assert [event.kind for event in events].count("done") == 1
    assert events[-1].kind == "done"
    assert stream.result is events[-1].result
    return [(event.kind, event.text) for event in events[:-1]], stream.result


def test_reasoning_and_text_are_kinds_of_events(model):
    say = script(model, "The user says hello.\n</think>\n\nHello! 🦀")
    events, message = events_of(model.stream(ASK, think=True, processors=[say]))
    kinds = [kind for kind, _ in events]
    assert kinds == sorted(kinds)
    assert set(kinds) == {"reasoning", "text"}
    assert "".join(text for kind, text in events if kind == "reasoning") == message.reasoning
    assert "".join(text for kind, text in events if kind == "text") == message.text
    assert (message.reasoning, message.text) == ("The user says hello.", "Hello! 🦀")
    assert message.finish_reason == "stop"
    assert message.tokens[-1] == model.tokenizer.token_id("<|im_end|>")
    before = message.tokens.index(model.tokenizer.token_id("</think>")) + 1
    assert message.usage.reasoning_tokens == before
    assert message.usage.completion_tokens == len(message.tokens) > before
    assert str(message) == message.text


def test_reasoning_that_is_cut_off_stays_reasoning(model):
    say = script(model, "The user says hello and wants")
    message = model.chat(ASK, think=True, processors=[say], max_tokens=4)
    assert (message.text, message.finish_reason) == ("", "length")
    assert message.reasoning
    assert message.usage.reasoning_tokens == 4


def test_no_reasoning_without_a_think_block(model):
    message = model.chat(ASK, think=False, processors=[script(model, "</think>\n\nHi")])
    assert (message.reasoning, message.text) == (None, "Hi")
    assert message.usage.reasoning_tokens == 0


def test_raw_text_is_not_taken_apart(model):
    done = model.generate("x", processors=[script(model, "a</think>\n\nb<tool_call>")])
    assert done.text == "a</think>\n\nb<tool_call>"
    assert isinstance(done, qdelta.Completion)
    assert str(done) == done.text


def test_special_tokens_have_no_text(model):
    ids = [*model.encode("a"), model.tokenizer.token_id("<|im_start|>"), *model.encode("b"), 4095]
    done = model.generate("x", processors=[script(model, ids[:-1])])
    assert done.text == "ab"


def test_characters_are_never_cut(model):
    """Each event is whole characters; half a character at the end is one U+FFFD."""
    crab = model.encode("🦀")
    assert len(crab) > 1
    events, done = events_of(model.stream("x", processors=[script(model, [*crab, *crab])]))
    assert events == [("text", "🦀"), ("text", "🦀")]
    events, done = events_of(model.stream("x", processors=[script(model, crab[:-1])]))
    assert events == [("text", "\ufffd")]
    assert done.text == "\ufffd"
    done = model.generate("x", processors=[script(model, crab)], stop="\ufffd")
    assert (done.text, done.usage.completion_tokens) == ("🦀", len(crab) + 1)


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        ("hat", "There was a ", "stop"),
        (["zzz", "a hat. T"], "There was ", "stop"),
        ("\n\n", "There was a hat. The end.", "stop"),
        (["The end.", "hat. The"], "There was a ", "stop"),
        ("Nobody", "There was a hat. The end.\n\nNot", "stop"),
        ("Nottingham", "There was a hat. The end.\n\nNot", "stop"),
    ],
)
def test_stop_strings_end_a_text(model, stop, text, reason):
    say = script(model, "There was a hat. The end.\n\nNot")
    events, done = events_of(model.stream("x", stop=stop, processors=[say]))
    assert (done.text, done.finish_reason) == (text, reason)
    assert "".join(text for _, text in events) == text


def test_stop_strings_leave_reasoning_alone(model):
    text = "I think: stop here.\n</think>\n\nGo. stop Now."
    message = model.chat(ASK, think=True, stop="stop", processors=[script(model, text)])
    assert (message.reasoning, message.text) == ("I think: stop here.", "Go. ")
    message = model.chat(
        ASK, think=True, stop="stop", stop_in_reasoning=True, processors=[script(model, text)]
    )
    assert (message.reasoning, message.text) == ("I think: ", "")
    assert message.finish_reason == "stop"


def test_reasoning_held_for_a_stop_comes_before_the_answer(model):
    text = "I st</think>\n\nop"
    events, message = events_of(
        model.stream(
            ASK, think=True, stop="stop", stop_in_reasoning=True, processors=[script(model, text)]
        )
    )
    assert [kind for kind, _ in events] == sorted(kind for kind, _ in events)
    assert (message.reasoning, message.text) == ("I st", "op")


def test_ends_of_a_turn(model):
    for name in ("<|im_end|>", "<|endoftext|>"):
        ids = [*model.encode("a"), model.tokenizer.token_id(name), *model.encode("b")]
        done = model.generate("x", processors=[script(model, ids)])
        assert (done.text, done.finish_reason, len(done.tokens)) == ("a", "stop", 2)
        done = model.generate("x", processors=[script(model, ids)], ignore_eos=True, max_tokens=3)
        assert (done.text, done.finish_reason, done.tokens) == ("ab", "length", ids)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_max_tokens(model, count):
    done = model.generate("Once upon a time", max_tokens=count, ignore_eos=True, seed=1)
    assert (len(done.tokens), done.finish_reason) == (count, "length")
    assert done.usage.completion_tokens == count
    assert done.timings.decode_tokens == max(0, count - 1)


def test_context_is_used_to_its_end():
    model = qdelta.load("demo", quant="none", ctx=16, threads=1)
    done = model.generate([5] * 10, ignore_eos=True, seed=0)
    assert (len(done.tokens), done.finish_reason) == (16 - 10 + 1, "length")
    assert len(model.generate([5] * 16, max_tokens=9, ignore_eos=True).tokens) == 1
    with pytest.raises(
        qdelta.ContextError, match="17 tokens needed, the context holds 16"
    ) as caught:
        model.generate([5] * 17)
    assert (caught.value.needed, caught.value.available) == (17, 16)


# Ways to leave


def test_timings_and_usage(model):
    done = model.generate("Once upon a time", max_tokens=10, ignore_eos=True, seed=0)
    timings = done.timings
    assert timings.prefill_tokens == done.usage.prompt_tokens == 4
    assert timings.decode_tokens == 9
    assert done.usage.total_tokens == 14
    assert timings.load_s > 0
    assert 0 < timings.prefill_s <= timings.first_token_s
    assert timings.decode_s > 0 and timings.sample_s > 0
    assert timings.prefill_tokens_per_s == pytest.approx(4 / timings.prefill_s)
    assert timings.decode_tokens_per_s == pytest.approx(9 / (timings.decode_s + timings.sample_s))


def test_time_between_events_is_not_counted(model):
    with model.stream("Once upon a time", max_tokens=5, ignore_eos=True, seed=0) as events:
        time.sleep(0.3)
        for _ in events:
            time.sleep(0.05)
    timings = events.result.timings
    assert timings.decode_s + timings.sample_s + timings.first_token_s < 0.2


def check_usable(model):
    assert model.generate("Once upon a time", max_tokens=3, temperature=0).text == ", there was"


def test_leaving_early(model):
    for event in model.stream("Once upon a time", ignore_eos=True):
        assert event.kind == "text"
        break
    with model.stream("Once upon a time", ignore_eos=True) as events:
        next(events)
    assert list(events) == []
    assert events.result is None
    check_usable(model)


def test_close_before_the_first_event(model):
    events = model.stream("Once upon a time")
    events.close()
    assert list(events) == []
    check_usable(model)


def test_cancel_before_and_between(model):
    events = model.stream("Once upon a time", ignore_eos=True)
    events.cancel()
    last = list(events)[-1].result
    assert (last.finish_reason, last.tokens, last.timings.prefill_tokens) == ("cancelled", [], 0)
    events = model.stream("Once upon a time", ignore_eos=True)
    first = next(events)
    events.cancel()
    rest = list(events)
    assert rest[-1].result.finish_reason == "cancelled"
    assert rest[-1].result.text == first.text + "".join(event.text for event in rest[:-1])
    check_usable(model)


def endless(events: list):
    """A processor that notes each token, and never lets an answer end by itself."""

    def note(ids, row):
        events.append(len(ids))
        return row

    return note


def test_cancel_from_another_thread(model):
    seen: list[int] = []
    stream = model.stream("Once", ignore_eos=True, processors=[endless(seen)])
    results = []
    worker = threading.Thread(target=lambda: results.extend(stream))
    worker.start()
    while len(seen) < 5:
        time.sleep(0.001)
    stream.cancel()
    at_cancel = len(seen)
    worker.join(30)
    assert not worker.is_alive()
    assert results[-1].result.finish_reason == "cancelled"
    assert len(results[-1].result.tokens) <= at_cancel + 1
    check_usable(model)


def test_close_from_another_thread(model):
    seen: list[int] = []
    stream = model.stream("Once", ignore_eos=True, processors=[endless(seen)])
    worker = threading.Thread(target=lambda: list(stream))
    worker.start()
    while len(seen) < 5:
        time.sleep(0.001)
    stream.close()
    worker.join(30)
    assert not worker.is_alive()
    check_usable(model)


def test_timeout(model):
    done = model.generate("Once upon a time", timeout=0)
    assert (done.finish_reason, done.tokens) == ("timeout", [])
    begun = time.monotonic()
    done = model.generate(
        "Once upon a time", timeout=0.2, ignore_eos=True,
        processors=[lambda ids, row: time.sleep(0.01) or row],
    )  # fmt: skip
    assert done.finish_reason == "timeout"
    assert 0 < len(done.tokens) <= 20
    assert 0.2 <= time.monotonic() - begun < 5
    assert model.generate("Once", timeout=60, max_tokens=1).finish_reason == "length"


def test_a_prompt_stops_between_pieces(model):
    """A long prompt is given up after the piece in which it was cancelled."""
    stream = model.stream([5] * 2000)
    timer = threading.Timer(0.005, stream.cancel)
    timer.start()
    result = list(stream)[-1].result
    timer.join()
    assert result.finish_reason == "cancelled"
    assert result.timings.prefill_tokens in (0, 512, 1024, 1536, 2000)


def test_keyboard_interrupt(model):
    seen: list[int] = []

    def interrupt(ids, row):
        seen.append(len(ids))
        if len(seen) == 5:
            _thread.interrupt_main()
        return row

    with pytest.raises(KeyboardInterrupt):
        model.generate("Once", ignore_eos=True, processors=[interrupt])
    assert len(seen) <= 6
    check_usable(model)


def test_an_error_in_a_processor_leaves_the_model_usable(model):
    def fail(ids, row):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        model.generate("Once", processors=[fail])
    check_usable(model)


# Threads


def test_threads_share_a_model(model):
    """Sessions do not touch one another: the answers are those of one thread alone."""
    prompts = ["Once upon a time", "The king said", "One day a cat", "Hello"]
    settings = {"max_tokens": 24, "seed": 7, "temperature": 0.8, "ignore_eos": True}
    alone = [model.generate(prompt, **settings).tokens for prompt in prompts]
    results: dict[int, list[int]] = {}

    def work(index):
        results[index] = model.generate(prompts[index % 4], **settings).tokens

    workers = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [results[index] for index in range(8)] == alone * 2


def test_other_threads_run_meanwhile(model):
    """While a prompt is fed, a thread of Python alone gets on."""
    counted = [0]
    stop = threading.Event()

    def count():
        while not stop.is_set():
            counted[0] += 1

    worker = threading.Thread(target=count)
    worker.start()
    try:
        session = model.session()
        before = counted[0]
        session.feed([5] * 2000, logits="none")
        during = counted[0] - before
    finally:
        stop.set()
        worker.join()
    assert during > 1000


# asyncio


def test_astream(model):
    async def run():
        stream = model.astream(ASK, processors=[script(model, "Hello you")])
        events = [event async for event in stream]
        assert stream.result is events[-1].result
        return events

    events = asyncio.run(run())
    assert "".join(event.text for event in events) == events[-1].result.text == "Hello you"


def test_astream_checks_at_once(model):
    with pytest.raises(TypeError, match="max_tokens"):
        model.astream("x", max_token=5)


def test_astream_lets_other_tasks_run(model):
    async def run():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        async for _ in model.astream("Once", max_tokens=20, ignore_eos=True):
            pass
        ticking.cancel()
        return ticks

    assert asyncio.run(run()) > 20


@pytest.mark.parametrize("managed", [True, False])
def test_cancelled_task_ends_the_generation(model, managed):
    seen: list[int] = []

    def slow(ids, row):
        seen.append(len(ids))
        time.sleep(0.002)
        return row

    async def consume():
        stream = model.astream("Once", ignore_eos=True, processors=[slow, silence])
        if managed:
            async with stream:
                async for _ in stream:
                    pass
        async for _ in stream:
            pass

    async def run():
        task = asyncio.create_task(consume())
        while len(seen) < 5:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        at_cancel = len(seen)
        await asyncio.sleep(0.05)
        return at_cancel

    at_cancel = asyncio.run(run())
    assert len(seen) <= at_cancel + 1
    check_usable(model)


def silence(ids, row):
    """A token without text each time, so that no event comes between tokens."""
    row[:] = -np.inf
    row[4071] = 0.0
    return row


def test_astream_left_early(model):
    async def run():
        async with model.astream("Once", ignore_eos=True) as stream:
            async for event in stream:
                return event

    assert asyncio.run(run()).kind == "text"
    check_usable(model)


def test_astream_error_in_the_thread(model):
    def fail(ids, row):
        raise RuntimeError("mine")

    async def run():
        async for _ in model.astream("Once", processors=[fail]):
            pass

    with pytest.raises(RuntimeError, match="mine"):
        asyncio.run(run())
