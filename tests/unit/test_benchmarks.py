from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from benchmarks import lm_eval_check, serve, serve_http, serve_long, workloads
from benchmarks.harness import distribution
from benchmarks.load import Answer, Burst, Endpoint, Events, LoadError, stream
from benchmarks.peers.environments import ENVIRONMENTS, Environment, missing


def test_events_are_read_however_they_are_cut() -> None:
    sent = b': hello\r\n\r\ndata: {"a": "\xc3\xa4"}\r\n\r\ndata:[DONE]\n\n'
    for size in range(1, len(sent) + 1):
        events = Events()
        got = [data for i in range(0, len(sent), size) for data in events.feed(sent[i : i + size])]
        assert got == ['{"a": "ä"}', "[DONE]"], size


def chunk(text: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(text), text)


def event(**content: object) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


OK = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
ROLE = event(choices=[{"delta": {"role": "assistant", "content": ""}}])
WORD = event(choices=[{"delta": {"content": "word"}}])
USAGE = event(choices=[], usage={"completion_tokens": 3, "prompt_tokens": 7})
REFUSED = b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 6\r\n\r\nno key"


class Canned:
    """A server that says the same thing to everybody, piece by piece."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces, self.asked, self.together, self.most = pieces, list[bytes](), 0, 0
        self.connections = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                self.asked.append(head + await reader.readexactly(length))
                self.together += 1
                self.most = max(self.most, self.together)
                for piece in self.pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0.005)
                self.together -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    def answer(self, questions: list[str], concurrency: int) -> Burst:
        async def run() -> Burst:
            server = await asyncio.start_server(self.handle, "127.0.0.1", 0)
            port = server.sockets[0].getsockname()[1]
            there = Endpoint(f"http://127.0.0.1:{port}/v1", "m", "sk-1", {"ignore_eos": True})
            try:
                return await stream(there, questions, 3, concurrency, 20.0)
            finally:
                server.close()

        return asyncio.run(run())


def test_the_client_counts_tokens_as_told_and_the_first_text_as_first() -> None:
    server = Canned(
        OK, chunk(ROLE), chunk(WORD[:9]), chunk(WORD[9:] + WORD), chunk(USAGE), chunk(b"")
    )
    told = server.answer(["a?", "b?", "c?"], 2)
    assert [(a.tokens, a.prompt_tokens, len(a.gaps_s)) for a in told.answers] == [(3, 7, 1)] * 3
    assert all(0 < a.first_s < a.total_s <= told.seconds for a in told.answers)
    assert told.tokens == 9
    assert (server.most, server.connections) == (2, 2), "two at a time, on kept connections"
    body = json.loads(server.asked[0].split(b"\r\n\r\n", 1)[1])
    assert body["ignore_eos"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert b"authorization: Bearer sk-1\r\n" in server.asked[0]


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ((REFUSED,), "answered 401: no key"),
        ((OK, chunk(event(error={"message": "lost"})), chunk(b"")), "broke off"),
        ((OK, chunk(USAGE), chunk(b"")), "0 pieces of text"),
        ((OK, chunk(WORD), chunk(b"")), "usage={}"),
    ],
)
def test_what_is_no_answer_is_an_error(pieces: tuple[bytes, ...], said: str) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        Canned(*pieces).answer(["a?"], 1)
    assert caught.group_contains(LoadError, match=said)


def test_load_goes_nowhere_but_to_loopback() -> None:
    away = Endpoint("http://192.0.2.1:80/v1", "m")
    with pytest.raises(LoadError, match="loopback"):
        asyncio.run(stream(away, ["a?"], 1, 1, 1.0))
    with pytest.raises(LoadError, match="at most 64"):
        asyncio.run(stream(away, ["a?"], 1, 65, 1.0))


def test_lengths_are_the_same_everywhere_and_shaped_like_chats() -> None:
    drawn = workloads.lengths(1000, seed=0)
    assert drawn[:3] == workloads.lengths(3, seed=0)
    prompts, answers = sorted(p for p, _ in drawn), sorted(a for _, a in drawn)
    assert workloads.SHORTEST <= prompts[0] < 30
    assert prompts[-1] == workloads.LONGEST_PROMPT
    assert 70 < prompts[500] < 110
    assert 85 < answers[500] < 115
    assert sum(prompts) / 1000 > 1.4 * prompts[500], "a few long ones carry the mean"


def test_rounds_share_no_prefix_and_keep_their_sizes() -> None:
    tokens = list(range(20_000))
    one, two = (workloads.mix(tokens, 32, seed) for seed in (1, 2))
    assert one == workloads.mix(tokens, 32, 1)
    assert one.answers == two.answers
    assert [len(p) for p in one.prompts] == [len(p) for p in two.prompts]
    starts = [p[0] for load in (one, two) for p in load.prompts]
    assert len(set(starts)) == len(starts)
    long = workloads.long_context(tokens, 8, 2000, 32, 1)
    assert {len(p) for p in long.prompts} == {2000}
    assert long.longest == 2032 <= serve.MAX_LEN
    assert one.longest <= serve.MAX_LEN


def test_the_corpus_of_a_fresh_clone_holds_eight_long_contexts(tmp_path: Path) -> None:
    words = workloads.corpus(lambda text: list(range(len(text.split()))))
    # a word is more than one token, so the real corpus is longer
    assert len(words) > serve.CONTEXT_TOKENS + serve.LONG
    source, asked = workloads.questions(tmp_path / "absent.jsonl")
    assert (source, len(asked)) == ("demo", 296)
    first, second = (workloads.turn(asked, number, 32) for number in (0, 1))
    assert first[0] != second[0]
    assert len(second) == 32


def test_percentiles_are_samples_that_were_seen() -> None:
    told = distribution([float(n) for n in range(1, 101)])
    assert (told["p50"], told["p90"], told["p99"], told["max"]) == (50.5, 90.0, 99.0, 100.0)
    assert distribution([3.0])["p99"] == 3.0


def test_ratios_bear_the_names_that_targets_have() -> None:
    mine = {f"tokens_per_s_{name}": [20.0, 22.0] for name in serve.NAMES} | {"start_s": [5.0]}
    half = {name: [10.0, 11.0] for name in mine} | {"start_s": [10.0], "start_cold_s": [100.0]}
    slow = {name: [2.5] for name in mine} | {"start_s": [30.0], "start_cold_s": [300.0]}
    peers = {"vllm-bfloat16": slow, "vllm-float32": half}
    samples = {serve.OURS: mine, serve.INT8: mine, serve.BATCHING: half, **peers}
    found = serve.ratios(samples)
    assert serve.TARGETS.keys() <= found.keys()
    assert found["vs_vllm_c8"] == found["long_context_vs_vllm"] == 2.0
    assert found["vs_vllm_bfloat16_c8"] == 21.0 / 2.5, "each is told, the faster one counts"
    assert (found["start_vs_vllm_cold"], found["start_vs_vllm_warm"]) == (20.0, 2.0)


def test_ratios_through_http_bear_the_names_that_targets_have() -> None:
    def side(speed: float, first: float) -> dict[str, list[float]]:
        answers = (Answer(first, 1.0, (0.1, 0.2), 64, 9),) * 8
        samples: dict[str, list[float]] = {}
        for count in serve_http.CONCURRENCY:
            serve_http.note(samples, count, Burst(512 / speed, answers), 64)
        return samples

    samples = {name: side(100.0, 0.2) for name in serve_http.SERVERS}
    samples[serve_http.OURS] = side(200.0, 0.1) | {"idle_ttft_ms": [70.0, 72.0, 90.0]}
    samples[serve_http.BARE] = side(250.0, 0.1) | {"idle_ttft_ms": [60.0, 64.0, 65.0]}
    found = serve_http.ratios(samples)
    assert serve_http.TARGETS.keys() <= found.keys()
    assert found["http_vs_bare_c32"] == pytest.approx(0.8)
    assert found["ttft_vs_vllm_server_c8"] == pytest.approx(0.5)
    assert (found["ttft_added_ms_p50"], found["ttft_added_ms_p99"]) == (8.0, 25.0)


def test_growth_is_told_from_noise() -> None:
    tokens = [1000.0 * n for n in range(1, 101)]
    flat = [500.0 + (n * 7 % 5) for n in range(100)]
    grows = [500.0 + n for n in range(100)]
    warms = [300.0 + 20 * min(n, 10) for n in range(100)]
    assert abs(serve_long.slope(tokens, flat, 0.2)) < 0.005
    assert serve_long.slope(tokens, grows, 0.2) == pytest.approx(80 / 559.5, rel=0.02)
    assert serve_long.slope(tokens, warms, 0.2) == pytest.approx(0.0)
    with pytest.raises(ValueError, match="too few"):
        serve_long.slope([64.0], [500.0], 0.2)


def test_arguments_name_what_they_refuse(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.parse(["--sides", "roundhouse,transformers-cb"]).sides[1] == "transformers-cb"
    assert serve_http.parse(["--model", "/m", "--counts", "1,8"]).counts == [1, 8]
    for parse, wrong in ((serve.parse, "--sides=llama"), (serve_http.parse, "--counts=0")):
        with pytest.raises(SystemExit):
            parse([wrong])
        assert wrong.partition("=")[2] in capsys.readouterr().err


@pytest.mark.parametrize("environment", ENVIRONMENTS.values(), ids=lambda e: e.name)
def test_every_package_of_a_peer_is_pinned(environment: Environment) -> None:
    lines = environment.wanted.read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(line.count("==") == 1 for line in pins)
    assert not any(line.startswith(("torch==", "torchvision", "torchaudio")) for line in pins)
    assert set(environment.versions()) == {*environment.shows, "torch"}


def test_an_environment_of_another_list_is_out_of_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = ENVIRONMENTS["lm-eval"]
    monkeypatch.setattr("benchmarks.peers.environments.BASE", tmp_path)
    monkeypatch.setattr("benchmarks.peers.environments.ROOT", tmp_path)
    assert "is not there; run `make bench-peers`" in str(missing(environment))
    environment.root.mkdir()
    environment.stamp.write_text("torch==1.0\n")
    assert "out of date" in str(missing(environment))
    environment.stamp.write_text(environment.recipe)
    assert missing(environment) is None


def test_a_run_of_the_harness_is_read_and_compared(tmp_path: Path) -> None:
    place = tmp_path / "m"
    place.mkdir()
    scores = {"acc,none": 0.5, "acc_norm,none": 1.0}
    (place / "results_1.json").write_text(json.dumps({"results": {lm_eval_check.TASK: scores}}))
    rows = [
        {"doc_id": 1, "filtered_resps": [["-3.0", "False"], ["-4.0", "False"]]},
        {"doc_id": 0, "filtered_resps": [[-1.0, True], [-2.0, False]]},
    ]
    lines = "\n".join(map(json.dumps, rows))
    (place / f"samples_{lm_eval_check.TASK}_1.jsonl").write_text(lines)
    told = lm_eval_check.read(tmp_path)
    assert told["loglikelihood"] == [-1.0, -2.0, -3.0, -4.0]
    assert told["greedy"] == [1.0, 0.0, 0.0, 0.0]
    other = told | {"loglikelihood": [-1.0, -2.25, -3.0, -4.0]}
    found = lm_eval_check.compare(told, other)
    assert found == {"lm_eval_scores_equal": 1.0, "lm_eval_loglikelihood_diff": 0.25}
    assert lm_eval_check.compare(told, told | {"acc": [0.4]})["lm_eval_scores_equal"] == 0.0
